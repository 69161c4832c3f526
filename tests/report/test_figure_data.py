"""What figures say as numbers, against counts made one by one."""

from __future__ import annotations

import csv
import math
from itertools import combinations

import numpy as np
import pytest
from report_inputs import LABELS, LAYERS, WIDTH

from lapefast.detect import lape
from lapefast.detect.lape import criteria
from lapefast.neurons import NeuronSets
from lapefast.neurons.layout import Layout
from lapefast.report.figures import experts, sharing, sweep
from lapefast.report.figures import lape as lape_figures
from lapefast.report.figures.figure import readable
from lapefast.report.figures.matrix import changes
from lapefast.report.figures.methods import methods
from lapefast.report.figures.neurons import counts, intersections, overlap

LAYOUT = Layout(("a", "b"), {"a": 5, "b": 5})


def sets(layout: Layout = LAYOUT, **neurons: dict) -> NeuronSets:
    return NeuronSets(neurons, layout)


def test_neurons_are_counted_per_layer_and_label(neurons):
    figure = counts(neurons)
    assert figure.table.header == ["layer", "site", *LABELS]
    for layer, row in enumerate(figure.table.rows):
        site = f"layers.{layer}.mlp"
        assert row == [layer, site, *(len(neurons[label][site]) for label in LABELS)]
    assert figure.grids[0].values[LAYERS] == str(len(neurons[LABELS[1]]["layers.0.mlp"]))


def test_overlap_is_counted_neuron_by_neuron():
    given = sets(x={"a": [0, 1], "b": [0]}, y={"a": [1, 2]}, z={})
    figure = overlap(given)
    assert figure.table.rows == [
        ["x", "x", 3, 1.0],
        ["x", "y", 1, 1 / 4],
        ["x", "z", 0, 0.0],
        ["y", "y", 2, 1.0],
        ["y", "z", 0, 0.0],
        ["z", "z", 0, None],
    ]


def test_intersections_are_of_exactly_these_labels(neurons):
    found = dict(intersections(neurons).table.rows)
    for size in range(1, len(LABELS) + 1):
        for owners in combinations(LABELS, size):
            expected = sum(
                all((index in neurons[label][site]) == (label in owners) for label in LABELS)
                for site in neurons.sites
                for index in range(WIDTH)
            )
            assert found.get(", ".join(owners), 0) == expected


def test_the_largest_intersections_come_first_and_ties_in_the_labels_order():
    given = sets(x={"a": [0, 3]}, y={"a": [1, 3]}, z={"a": [2], "b": [1]})
    rows = intersections(given).table.rows
    assert rows == [["z", 2], ["x", 1], ["x, y", 1], ["y", 1]]


@pytest.mark.parametrize("form", ["paper", "released"])
def test_the_criteria_are_those_by_which_lape_chooses(profile, form):
    rates = {"top_rate": 0.2, "filter_rate": 0.5, "activation_bar_ratio": 0.6, "form": form}
    found, chosen = criteria(profile, **rates), lape(profile, **rates)
    p = np.concatenate([profile.counts[site].numpy() for site in profile.sites], axis=1) / 1000
    # float32 keeps 24 bits; the entropy sums four terms of at most 1/e.
    near = 1e-12 if form == "paper" else 4 * 2**-22
    values = sorted(p.ravel())
    assert found.least == pytest.approx(values[round(0.5 * p.size) - 1], abs=near)
    assert found.bar == pytest.approx(values[round(0.6 * p.size) - 1], abs=near)
    entropies = []
    for column in p.T:
        shares = [value / column.sum() for value in column if value]
        entropies.append(-sum(q * math.log(q) for q in shares) if shares else math.nan)
    np.testing.assert_allclose(found.entropy, entropies, atol=near, rtol=0)
    able = [e for e, column in zip(entropies, p.T, strict=True) if max(column) > found.least]
    assert found.cut == pytest.approx(sorted(able)[round(0.2 * p.shape[1]) - 1], abs=near)
    flat = {
        (profile.sites.index(site) * WIDTH + index, row)
        for row, label in enumerate(LABELS)
        for site, indices in chosen[label].items()
        for index in indices.tolist()
    }
    kept = found.qualifies & (found.entropy <= found.cut)
    assert flat == {(n, k) for k, n in np.argwhere(found.probabilities > found.bar) if kept[n]}


def test_nothing_chosen_has_no_cut(profile):
    assert criteria(profile, top_rate=1e-9, filter_rate=0.5).cut is None


def test_histograms_hold_every_neuron_once(profile):
    found = criteria(profile, filter_rate=0.5)
    table = lape_figures.entropies(found).table
    assert table.header == ["from", "to", "active", "qualified"]
    active = int((~np.isnan(found.entropy)).sum())
    assert active == LAYERS * WIDTH - 1
    assert sum(row[2] for row in table.rows) == active
    assert sum(row[3] for row in table.rows) == int(found.qualifies.sum())
    pairs = lape_figures.probabilities(found)
    start, end, count = pairs.table.rows[3]
    inside = (found.probabilities >= start) & (found.probabilities < end)
    assert count == int(inside.sum()) > 0
    assert f"filter bar: {found.least:.3f}" in pairs.caption


def test_changes_of_perplexity_stand_beside_those_of_random_sets(matrix):
    row = changes(matrix).table.rows[1 * len(LABELS) + 2]
    before, after = (float(matrix.nll[one, 2].exp()) for one in (0, 2))
    least, largest = (float(matrix.random_range[2, 2, one].exp()) - before for one in (0, 1))
    assert row[:2] == [LABELS[1], LABELS[2]]
    # Sums and exponentials of float64 values below 100: a few units of their last place.
    assert row[2:] == pytest.approx([before, after, after - before, least, largest], abs=1e-12)


def test_steering_rates_are_the_pairs(pairs):
    table = sweep.rates(pairs).table
    row = dict(zip(table.header, table.rows[5], strict=True))
    assert (row["source"], row["target"]) == (LABELS[1], LABELS[1])
    assert row["edited"] == 3 / 8
    assert (row["random"], row["random, least"], row["random, largest"]) == (0.3125, 0.25, 0.375)
    assert "diffmean" not in row
    kinds = {row[0]: row[1:] for row in sweep.kinds(pairs).table.rows}
    apart = [pair.edited.share for pair in pairs if pair.source != pair.target]
    assert kinds["edited"][0] == sum(apart) / len(apart)
    assert kinds["random"] == [0.3125, 0.25, 0.375]


def test_pairs_of_one_label_alone_have_no_mean(pairs):
    assert sweep.kinds(pairs[:1]) is None


def test_methods_are_compared_where_both_look():
    one = sets(x={"a": [0, 1], "b": [4]}, y={"a": [0]}, w={})
    other = sets(Layout(("b", "c"), {"b": 5, "c": 5}), x={"b": [3, 4], "c": [0]}, w={})
    found = methods({"one": one, "other": other}).table.rows
    assert found == [["x", "one", "other", 1, 2, 1, 1 / 2], ["w", "one", "other", 0, 0, 0, None]]


def test_methods_that_know_positions_alone_are_compared_by_position():
    published = sets(Layout((0, 1)), x={0: [0, 1], 1: [4]})
    found = methods({"one": sets(x={"a": [1], "b": [4]}), "published": published}).table.rows
    assert found == [["x", "one", "published", 2, 3, 2, 2 / 3]]


def test_frequencies_of_experts_are_spoken_label_by_label(tmp_path):
    frequency = np.random.default_rng(0).random((2, 3, 5))
    figure = experts.frequencies(["x", "y"], frequency)
    assert figure.table.rows[4] == ["y", 1, *frequency[1, 1].tolist()]
    grid = figure.grids[1]
    assert (grid.rows[2], grid.columns[4]) == ("y, layer 2", "expert 4")
    assert grid.values[2 * 5 + 4] == f"{frequency[1, 2, 4]:.4g}"
    assert len(figure.draw(True).axes) == 3  # one per label, and the colour bar


def test_shares_of_categories_are_spoken_layer_by_layer():
    mean = np.array([[0.25, 0.5], [0.75, 0.5]])
    figure = sharing.categories(["all-shared", "specific"], mean, mean - 0.1, mean + 0.1)
    assert figure.table.rows[3] == [1, "specific", 0.5, 0.4, 0.6]
    grid = figure.grids[1]
    assert (grid.rows, grid.columns[1], grid.values[1]) == (
        ["specific"],
        "layer 1",
        "50.0% (40.0% to 60.0%)",
    )


@pytest.mark.parametrize("layers", [1, 80])
def test_each_category_is_drawn_in_a_panel_from_0_to_1(layers):
    mean = np.full((4, layers), 0.25)
    drawing = sharing.categories(list("abcd"), mean, mean - 0.2, mean + 0.7).draw(True)
    assert [axes.get_title("left") for axes in drawing.axes] == list("abcd")
    for axes in drawing.axes:
        assert axes.get_ylim() == (0, 1)
        band, line = (patch.get_data() for patch in axes.patches)
        # Sums and differences of three numbers: a unit or two of their last place.
        np.testing.assert_allclose(band.values, [0.95] * layers, atol=1e-15, rtol=0)
        np.testing.assert_allclose(band.baseline, [0.05] * layers, atol=1e-15, rtol=0)
        np.testing.assert_array_equal(line.values, mean[0])


def test_sites_that_are_no_layers_are_named():
    figure = counts(sets(Layout(("0.mlp", "0.q")), x={"0.q": [1]}))
    assert figure.table.header == ["position", "site", "x"]
    assert figure.table.rows[1] == [1, "0.q", 1]
    assert list(figure.grids[0].columns) == ["site 0.mlp", "site 0.q"]


def test_methods_are_drawn_by_their_whole_names_and_colours_reach_to_the_largest():
    names = ["average-precision", "average-precision of another file"]
    given = [sets(x={"a": [0, 1, 2]}), sets(x={"a": [2, 3, 4]})]
    axes, bar = methods(dict(zip(names, given, strict=True))).draw(True).axes
    assert [one.get_text() for one in axes.get_yticklabels()] == [" × ".join(names)]
    assert axes.images[0].get_clim() == (0, 1 / 5)


@pytest.mark.parametrize("count", [2, 13, 30])
def test_every_label_is_named_and_every_cell_of_labels_has_its_number(count):
    labels = [f"label {one}" for one in range(count)]
    values = np.random.default_rng(0).random((count, count))
    axes, _ = experts.similarities(labels, values, "t", "c", "n").draw(True).axes
    assert [one.get_text() for one in axes.get_xticklabels()] == labels
    assert [one.get_text() for one in axes.texts] == [f"{value:.2f}" for value in values.flat]


def test_experts_that_are_several_labels_are_said_to_be_left_out():
    given = NeuronSets({"x": {"a": [0]}, "y": {}}, LAYOUT, {"parameters": {"only": True}})
    assert "no two labels share any" in overlap(given).caption
    assert "no two labels share any" not in overlap(sets(x={}, y={})).caption


@pytest.mark.parametrize(
    ("value", "form", "said"),
    [
        (-0.001, "+.2f", "0.00"),
        (0.0, "+.2f", "0.00"),
        (-0.0, ".4g", "0"),
        (-12.345, "+.2f", "\u221212.35"),
        (12.5, "+.2f", "+12.50"),
        (-1e-7, ".4g", "\u22121e\u221207"),
    ],
)
def test_numbers_have_a_minus_sign_and_zero_has_none(value, form, said):
    assert readable(value, form) == said


def test_a_figure_is_saved_as_png_svg_and_csv(tmp_path, matrix):
    figure = changes(matrix)
    files = figure.save(tmp_path)
    assert [path.name for path in files] == ["matrix.png", "matrix.svg", "matrix.csv"]
    with open(files[2], encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == figure.table.header
    assert [[*row[:2], *map(float, row[2:])] for row in rows] == figure.table.rows
