"""Figures."""

from __future__ import annotations

import matplotlib
import matplotlib.image
import pytest
import torch

from lapefast.errors import InputError
from lapefast.evaluate import PerplexityMatrix
from lapefast.neurons import NeuronSets
from lapefast.neurons.layout import Layout
from lapefast.report import draw_matrix, draw_neurons
from lapefast.report.figures.matrix import changes
from lapefast.report.fonts import drawable
from lapefast.report.svg import inline


def matrix(labels: list[str]) -> PerplexityMatrix:
    count = len(labels)
    nll = 2 + torch.rand(
        count + 1, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    ranges = torch.stack([nll, nll], dim=-1)
    return PerplexityMatrix(["none", *labels], labels, nll, nll, ranges, [1] * count)


def neurons(labels: list[str], layers: int) -> NeuronSets:
    sites = tuple(f"layers.{layer}.mlp" for layer in range(layers))
    layout = Layout(sites, dict.fromkeys(sites, 8))
    return NeuronSets({label: {sites[0]: [1, 2]} for label in labels}, layout)


def test_a_matrix_is_drawn_as_png_and_svg(tmp_path):
    png, svg = draw_matrix(matrix(["en", "zh"]), tmp_path / "matrix")
    assert (png.name, svg.name) == ("matrix.png", "matrix.svg")
    assert matplotlib.image.imread(png).shape[1] == pytest.approx(3.35 * 300, abs=1)
    text = svg.read_text("utf-8")
    assert "zh" in text
    assert "change of perplexity" in text


@pytest.mark.parametrize("layers", [1, 4, 80])
def test_neurons_are_drawn_for_any_number_of_layers(tmp_path, layers):
    assert all(
        path.stat().st_size for path in draw_neurons(neurons(["en"], layers), tmp_path / "n")
    )


def test_the_same_figure_is_the_same_file(tmp_path):
    first = draw_matrix(matrix(["en", "zh"]), tmp_path / "first")
    again = draw_matrix(matrix(["en", "zh"]), tmp_path / "again")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


@pytest.mark.parametrize(
    "settings",
    [
        {"figure.autolayout": True},
        {"savefig.dpi": 50},
        {"figure.dpi": 50},
        {"text.color": "white", "figure.facecolor": "black", "savefig.transparent": True},
        {"savefig.bbox": "tight", "axes.grid": True, "axes.unicode_minus": False},
    ],
    ids=str,
)
def test_a_users_settings_of_matplotlib_change_nothing(tmp_path, settings):
    first = draw_matrix(matrix(["en", "zh"]), tmp_path / "first")
    page = inline(changes(matrix(["en", "zh"])).in_browser, "a", "b")
    with matplotlib.rc_context(settings):
        again = draw_matrix(matrix(["en", "zh"]), tmp_path / "again")
        assert inline(changes(matrix(["en", "zh"])).in_browser, "a", "b") == page
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


@pytest.mark.parametrize("label", ["中文", "$x$", "a_{b}", "العربية", "<&>"])
def test_labels_in_any_script_are_drawn_without_complaint(tmp_path, label, recwarn):
    draw_matrix(matrix([label, "en"]), tmp_path / "matrix")
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


@pytest.mark.parametrize("count", [1, 7, 12, 30])
def test_long_labels_are_shortened_and_leave_room_for_the_cells(tmp_path, count, recwarn):
    labels = [f"{index:02} a label that says rather much of itself" for index in range(count)]
    _, svg = draw_matrix(matrix(labels), tmp_path / "matrix")
    draw_neurons(neurons(labels, 32), tmp_path / "neurons")
    assert "00 a label that…" in svg.read_text("utf-8")
    assert not [one for one in recwarn if "layout" in str(one.message)]


def test_what_no_font_draws_is_escaped():
    families, (names,) = drawable(["en", "\U000e0fff"])
    assert families[0] == "DejaVu Sans"
    assert names == ["en", "\\U000e0fff"]


def test_control_characters_are_escaped_wherever_they_are_drawn():
    name = "\x1b[31mred\x00\ufffe"
    for escape in (True, False):
        assert drawable([name], escape=escape)[1] == [["\\x1b[31mred\\x00\\ufffe"]]


def test_a_directory_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        draw_matrix(matrix(["en"]), tmp_path / "nowhere" / "matrix")
