"""The page in a browser: values, tables, widths and themes."""

from __future__ import annotations

import importlib.util
import json

import pytest
from browser import PROGRAM, browser
from report_inputs import LABELS

from lapefast.neurons import NeuronSets
from lapefast.neurons.layout import Layout
from lapefast.report import Inputs, write_report
from lapefast.report.figures.matrix import changes

pytestmark = [
    pytest.mark.skipif(
        PROGRAM is None, reason="no Chromium to open the page in; apt-get install chromium"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("websocket") is None,
        reason="a browser is driven through websocket-client; pip install websocket-client",
    ),
]

VIEWS = [(width, theme) for width in (360, 1280) for theme in ("light", "dark")]
MATRIX = "document.getElementById('matrix')"
MINUS = "\u2212"
VALUE = "document.getElementById('value')"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def file(profile, neurons, matrix, sweep, sampled, pruning, deactivation, tmp_path):
    path = tmp_path / "report.html"
    given = {"sampled": sampled, "pruning": pruning, "deactivation": deactivation}
    write_report(path, Inputs(profile, {"lape": neurons}, matrix, sweep, **given))
    return path


def said(page) -> str | None:
    """The value that is shown, without the marks that isolate names."""
    text = page.evaluate(f"{VALUE}.hidden ? null : {VALUE}.textContent")
    return text and text.replace("\u2068", "").replace("\u2069", "")


def point_at(page, x: float, y: float) -> None:
    """Move to a place within the matrix's figure, in shares of its width and height."""
    page.evaluate(f"{MATRIX}.scrollIntoView()")
    left, top, width, height = page.evaluate(
        f"(({{left, top, width, height}}) => [left, top, width, height])"
        f"({MATRIX}.querySelector('.chart').getBoundingClientRect())"
    )
    page.hover(left + x * width, top + y * height)


@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_the_page_fits_its_window_asks_for_nothing_and_complains_of_nothing(
    page, file, width, theme
):
    page.open(file, width, theme)
    for opened in ("", "document.querySelectorAll('details').forEach((one) => one.open = true)"):
        page.evaluate(opened or "0")
        wide, window = page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= window <= width
    asked = [
        event["request"]["url"]
        for method, event in page.events
        if method == "Network.requestWillBeSent"
    ]
    assert [one for one in asked if not one.startswith("data:")] == [file.as_uri()]
    complaints = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in page.events if event[0] in complaints] == []


@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_text_stands_out_from_the_paper(page, file, width, theme):
    page.open(file, width, theme)
    ink, paper, drawn = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,"
        f"getComputedStyle({MATRIX}.querySelector('svg text')).fill]"
    )
    assert contrast(ink, paper) > 7  # WCAG 2, level AAA
    assert contrast(drawn, paper) > 7
    assert (luminance(paper) > 0.5) == (theme == "light")


def test_the_theme_can_be_changed(page, file):
    page.open(file, 1280, "light")
    paper = "getComputedStyle(document.body).backgroundColor"
    for dark in (True, False):
        page.evaluate("document.getElementById('theme').click()")
        assert (luminance(page.evaluate(paper)) < 0.5) == dark


@pytest.mark.parametrize("width", [360, 1280])
def test_hovering_over_a_cell_says_its_value(page, file, matrix, width):
    page.open(file, width, "light")
    (grid,) = json.loads(page.evaluate(f"{MATRIX}.querySelector('script').textContent"))
    left, top, wide, high = grid["box"]
    count = len(LABELS)
    for row in range(count):
        for column in range(count):
            x = left + wide * (column + 0.5) / count
            y = top + high * (row + 0.5) / count
            point_at(page, x, y)
            change = matrix.changes()[row, column]
            least, largest = matrix.random_changes()[row, column]
            values = f"{change:+.4g}, random sets {least:+.4g} to {largest:+.4g}"
            assert said(page) == (
                f"without {LABELS[row]}, text {LABELS[column]}: {values.replace('-', MINUS)}"
            )
    inside = page.evaluate(
        f"(({{left, right}}) => left >= 0 && right <= innerWidth)({VALUE}.getBoundingClientRect())"
    )
    assert inside
    point_at(page, 0.01, 0.01)
    assert said(page) is None


def test_the_cell_that_is_spoken_is_the_cell_that_is_drawn(page, file):
    page.open(file, 1280, "light")
    # The drawing has one image of cells, in the axes; the mark must lie within it.
    page.evaluate(f"{MATRIX}.scrollIntoView()")
    page.evaluate(f"{MATRIX}.querySelector('.chart').focus()")
    box = "(({left, top, right, bottom}) => [left, top, right, bottom])"
    image = page.evaluate(f"{box}({MATRIX}.querySelector('svg image').getBoundingClientRect())")
    page.press("ArrowRight")
    first = page.evaluate(f"{box}({MATRIX}.querySelector('.mark').getBoundingClientRect())")
    # In pixels; the box is rounded to 5 digits, and the mark to a part of a pixel.
    assert first[:2] == pytest.approx(image[:2], abs=1)
    assert first[2] - first[0] == pytest.approx((image[2] - image[0]) / len(LABELS), abs=1)
    assert first[3] - first[1] == pytest.approx((image[3] - image[1]) / len(LABELS), abs=1)


def test_arrow_keys_walk_over_the_cells(page, file):
    page.open(file, 1280, "dark")
    page.evaluate(f"{MATRIX}.querySelector('.chart').focus()")
    places = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.press(key)
        places.append(said(page).partition(":")[0])
    assert places == [
        f"without {LABELS[row]}, text {LABELS[column]}"
        for row, column in ((0, 0), (0, 1), (1, 1), (1, 0), (1, 0))
    ]
    page.press("Escape")
    assert said(page) is None


def test_tables_hold_the_inputs_and_sort(page, file, matrix):
    page.open(file, 1280, "light")
    table = f"{MATRIX}.querySelector('table')"
    read = f"[...{table}.tBodies[0].rows].map((row) => [...row.cells].map((c) => c.textContent))"
    given = changes(matrix).table.rows
    assert page.evaluate(read) == [[*row[:2], *map(written, row[2:])] for row in given]
    head = f"{table}.tHead.rows[0].cells[4]"
    for order in ("ascending", "descending"):
        page.evaluate(f"{head}.querySelector('button').click()")
        assert page.evaluate(f"{head}.getAttribute('aria-sort')") == order
        expected = sorted((row[4] for row in given), reverse=order == "descending")
        assert [row[4] for row in page.evaluate(read)] == [written(one) for one in expected]
    page.evaluate(f"{table}.tHead.rows[0].cells[0].querySelector('button').click()")
    assert page.evaluate(f"{table}.querySelectorAll('[aria-sort]').length") == 1
    # Sorting is stable: within a label, changes stay in the order that they had.
    rows = [row for row in page.evaluate(read) if row[0] == LABELS[0]]
    own = sorted((row[4] for row in given if row[0] == LABELS[0]), reverse=True)
    assert [row[4] for row in rows] == [written(one) for one in own]


def test_on_paper_charts_and_tables_fit_and_settings_are_open(page, profile, experts, tmp_path):
    path = tmp_path / "report.html"
    layers = [f"layers.{layer}.mlp" for layer in range(80)]
    sets = NeuronSets({"en": {layers[0]: [1]}, "zh": {}}, Layout(tuple(layers)))
    profile.metadata["notes"] = ["a note", *map(str, range(12))]
    write_report(path, Inputs(profile, {"long": sets}, experts=experts))
    page.open(path, 718, "light")  # A4 less its margins
    page.send("Emulation.setEmulatedMedia", media="print")
    cut = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > 718).length"
    note = "[...document.querySelectorAll('td')].find((one) => one.textContent === 'a note')"
    assert page.evaluate(cut) == 0
    assert page.evaluate(f"{note}.checkVisibility({{ contentVisibilityAuto: true }})")
    page.send("Emulation.setEmulatedMedia", media="")
    assert not page.evaluate(f"{note}.checkVisibility({{ contentVisibilityAuto: true }})")


def test_a_command_breaks_between_its_words(page, profile, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, Inputs(profile, files={"profile": "p.safetensors"}))
    page.open(path, 360, "light")
    words = "[...document.querySelectorAll('pre bdi')]"
    # One that is longer than the window must break within.
    short = f"{words}.filter((one) => one.textContent.length < 30)"
    lines = f"{short}.map((one) => one.getBoundingClientRect().height)"
    assert len(set(page.evaluate(lines))) == 1
    assert page.evaluate(f"{words}[3].textContent").startswith("--corpus=")


def test_no_label_became_an_element(page, file):
    page.open(file, 1280, "light")
    assert page.evaluate("[...document.scripts].filter((one) => !one.type).length") == 1
    tables = page.evaluate("[...document.querySelectorAll('td')].map((one) => one.textContent)")
    assert set(LABELS) <= set(tables)


def written(value: float) -> str:
    return f"{value:.4g}".replace("-", MINUS)


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, by WCAG 2."""
    channels = [int(one) / 255 for one in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return sum(share * one for share, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
