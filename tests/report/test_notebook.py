"""How results show themselves in a notebook, and as data frames."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from html import unescape
from xml.etree import ElementTree

import pytest
from report_inputs import LABELS, LAYERS, WIDTH

import lapefast as lf
from lapefast import display
from lapefast.evaluate.sweep import Sweep, SweepRow
from lapefast.profiles import Profile


def cells(page: str) -> list[list[str]]:
    rows = re.findall("<tr>(.*?)</tr>", page)
    return [re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["en", "exactly eight"[:8]], ["en", "exactly "]),
        (["en", "a long name"], ["en", "a long …"]),
        (["simplified one", "simplified two", "en"], ["sim… one", "sim… two", "en"]),
        (["a b c d e f tail", "a b c d x y tail"] * 2, ["a b c …1", "a b c …2"] * 2),
    ],
)
def test_names_that_are_shortened_stay_different(names, short):
    assert display.shortened(names, 8) == short


@pytest.fixture
def sweep() -> Sweep:
    rows = [
        SweepRow("en", target, kind, None, "p", "t", [1, 2], language, 0.5)
        for target, kind, language in [(None, "unedited", "en"), ("fr", "edited", "fr")]
    ]
    return Sweep(
        [("en", "fr")], rows, {("en", "fr"): 0}, {"en": "en", "fr": "fr"}, {"random_sets": 0}
    )


def test_a_profile_becomes_a_row_per_label_site_and_neuron(profile):
    frame = profile.to_pandas()
    assert list(frame.columns) == ["label", "site", "neuron", "counts"]
    assert len(frame) == len(LABELS) * LAYERS * WIDTH
    for label, site, neuron, count in frame.itertuples(index=False):
        assert count == profile.counts[site][profile.labels.index(label), neuron]


def test_neuron_sets_become_a_row_per_neuron(neurons):
    frame = neurons.to_pandas()
    assert list(frame.itertuples(index=False, name=None)) == [
        (label, site, neuron)
        for label in neurons
        for site in neurons.sites
        for neuron in neurons[label][site].tolist()
    ]


def test_a_matrix_becomes_a_row_per_deactivated_label_and_text(matrix):
    frame = matrix.to_pandas().set_index(["deactivated", "text"])
    row = frame.loc[LABELS[1], LABELS[2]]
    assert row["nll"] == matrix.nll[2, 2]
    assert row["change"] == matrix.changes()[1, 2]
    assert row["random_nll_least"] == matrix.random_range[2, 2, 0]
    assert frame.loc["none", LABELS[0]]["change"] == 0


def test_a_sweep_becomes_a_row_per_generation(sweep):
    frame = sweep.to_pandas()
    assert list(frame["text"]) == ["t", "t"]
    assert list(frame.columns) == list(asdict(sweep.rows[0]))


def test_a_profile_shows_how_active_each_label_is(profile):
    shown = cells(profile._repr_html_())
    assert shown[0] == ["label", "tokens", "active at a token"]
    total = sum(int(profile.counts[site][0].sum()) for site in profile.sites)
    assert shown[1] == ["en", "1,000", f"{total / (1000 * LAYERS * WIDTH):.1%}"]


def test_a_profile_without_counts_or_tokens_shows_its_labels(profile):
    tokens = {"decoder": profile.tokens * 0}
    empty = Profile(LABELS, profile.site_info, tokens, {})
    assert cells(empty._repr_html_())[:2] == [["label", "tokens"], ["en", "0"]]


def test_neuron_sets_show_how_many_lie_where(neurons):
    shown = cells(neurons._repr_html_())
    layers = [len(one) for one in neurons.layers("en")]
    assert shown[1] == ["en", str(sum(layers)), *map(str, layers)]


def test_a_matrix_shows_changes_shaded_by_their_sign(matrix):
    page = matrix._repr_html_()
    assert cells(page)[1][1:] == [f"{one:+.2f}" for one in matrix.changes()[0].tolist()]
    assert page.count("rgba(230,159,0") == int((matrix.changes() < 0).sum()) > 0


def test_a_sweep_shows_its_rates(sweep):
    assert cells(sweep._repr_html_()) == [["", "fr"], ["en", "100%"]]


def test_a_label_is_text_in_a_notebook(profile, neurons, matrix):
    for one in (profile, neurons, matrix):
        assert "<script" not in one._repr_html_()
        assert "&lt;script&gt;" in one._repr_html_()


def test_the_strongest_shade_is_the_largest_value():
    page = display.table("c", ["h"], [["0"], ["1"], ["-2"]], [[0.0], [1.0], [-2.0]])
    assert re.findall(r"rgba\((.*?)\)", page) == [
        "0,114,178,0.00",
        "0,114,178,0.60",
        "230,159,0,0.60",
    ]


def chart(page: str) -> ElementTree.Element:
    (svg,) = re.findall("<svg.*?</svg>", page, re.DOTALL)
    return ElementTree.fromstring(svg)


def test_a_chart_stands_beside_the_table(profile, neurons, matrix, sweep):
    shown = {
        name: chart(one._repr_html_())
        for name, one in {
            "profile": profile,
            "neurons": neurons,
            "matrix": matrix,
            "sweep": sweep,
            "comparison": lf.compare(neurons, neurons),
        }.items()
    }
    count = {name: len(svg.findall("rect")) for name, svg in shown.items()}
    labels = len(LABELS)
    assert count == {
        "profile": labels,
        "neurons": labels * LAYERS,
        "matrix": labels**2,
        "sweep": 1,
        "comparison": labels**2,
    }
    means = [
        sum(float(profile.counts[one][row].sum()) for one in profile.sites) for row in range(4)
    ]
    widths = [float(bar.get("width")) for bar in shown["profile"].findall("rect")]
    # Written with six digits.
    assert [one / max(widths) for one in widths] == pytest.approx(
        [one / max(means) for one in means], rel=1e-5
    )
    changes = matrix.changes().flatten()
    cells = shown["matrix"].findall("rect")
    blue = [cell.get("fill") == "rgb(0,114,178)" for cell in cells]
    assert blue == (changes >= 0).tolist()
    opacities = [float(cell.get("fill-opacity")) for cell in cells]
    expected = (changes / changes.abs().max()).abs().tolist()
    assert opacities == pytest.approx(expected, abs=0.005)  # two digits
    first = shown["matrix"].find("rect/title").text
    assert first == f"{LABELS[0]}, {LABELS[0]}: {float(changes[0]):+.2f}"


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 2), (7, 80), (80, 4), (300, 1), (2, 500)]
)
def test_names_on_a_chart_lie_within_it_and_do_not_overlap(rows, columns):
    names = [f"row {row}" for row in range(rows)]
    page = display.table(
        "c",
        ["", *map(str, range(columns))],
        [[name, *["0"] * columns] for name in names],
        [[0.5] * columns] * rows,
    )
    svg = chart(page)
    across, down = float(svg.get("width")), float(svg.get("height"))
    for rect in svg.findall("rect"):
        assert float(rect.get("x")) + float(rect.get("width")) <= across
        assert float(rect.get("y")) + float(rect.get("height")) <= down
    for anchor, axis, apart in (("end", "y", 12), ("middle", "x", 24)):
        places = [float(t.get(axis)) for t in svg.findall("text") if t.get("text-anchor") == anchor]
        gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
        assert all(gap >= apart for gap in gaps)
        assert len(places) >= (anchor == "end" or columns > 1)


def test_a_table_without_shades_has_no_chart(profile):
    assert "<svg" not in display.table("c", ["h"], [["0"]])
    assert "<svg" not in display.table("c", ["h"], [], [])
    empty = Profile(LABELS, profile.site_info, {"decoder": profile.tokens * 0}, {})
    assert "<svg" not in empty._repr_html_()


def test_showing_loads_neither_pandas_nor_matplotlib():
    code = (
        "import sys, torch\n"
        "from lapefast.neurons import NeuronSets\n"
        "from lapefast.neurons.layout import Layout\n"
        "assert '<table' in NeuronSets({'en': {'a': [1]}}, Layout(('a',)))._repr_html_()\n"
        "assert not {'pandas', 'matplotlib', 'lapefast.report'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_comparison_shows_common_neurons(neurons):
    compared = lf.compare(neurons, neurons)
    shown = cells(compared._repr_html_())
    assert [unescape(one) for one in shown[0][1:]] == neurons.labels
    assert [row[1:] for row in shown[1:]] == [
        list(map(str, row)) for row in compared.common.tolist()
    ]


def test_sharing_and_experts_show_themselves(sharing, experts):
    assert "all-shared" in sharing._repr_html_()
    shown = cells(experts._repr_html_())
    assert [unescape(one) for one in shown[0][1:]] == experts.order()
    assert all(row[at] == "1.00" for at, row in enumerate(shown) if at)
