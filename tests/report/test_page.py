"""The page as text: what is on it, that all text is text, and that it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from report_inputs import LABELS
from tqdm.auto import tqdm

from lapefast.detect import Experts
from lapefast.detect.sharing.result import Spread
from lapefast.errors import InputError
from lapefast.evaluate import CategoryDeactivation
from lapefast.neurons import NeuronSets
from lapefast.report import Inputs, write_report
from lapefast.report.figures.sharing import deactivations
from lapefast.report.sections import sections

SCRIPT = LABELS[3]


@pytest.fixture
def inputs(
    profile, neurons, matrix, sweep, sampled, experts, pruning, sharing, deactivation
) -> Inputs:
    other = NeuronSets({LABELS[0]: neurons[LABELS[1]]}, neurons.layout, {"method": "plnd"})
    return Inputs(
        profile,
        {"lape": neurons, "plnd": other},
        matrix,
        sweep,
        sampled,
        experts,
        pruning,
        sharing,
        deactivation,
        {"profile": "p.safetensors", "lape": "n.json", "matrix": "m.json"},
    )


@pytest.fixture
def page(inputs, tmp_path) -> str:
    write_report(tmp_path / "report.html", inputs)
    return (tmp_path / "report.html").read_text("utf-8")


def headings(page: str) -> list[str]:
    return re.findall("<h2><bdi>(.*?)</bdi></h2>", page)


def test_every_input_has_its_section(page):
    assert headings(page) == [
        "What was measured",
        "Neurons: lape",
        "Neurons: plnd",
        "Methods compared",
        "Distributions and thresholds of LAPE",
        "Perplexity",
        "Steering",
        "Texts from nothing",
        "Experts",
        "Pruning of experts",
        "Sharing",
        "Categories deactivated",
    ]


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ("profile", ["Distributions and thresholds of LAPE, with its published constants"]),
        ("matrix", ["Perplexity"]),
        ("sweep", ["Steering"]),
        ("sampled", ["Texts from nothing"]),
        ("experts", ["Experts"]),
        ("pruning", ["Pruning of experts"]),
        ("sharing", ["Sharing"]),
        ("deactivation", ["Categories deactivated"]),
    ],
)
def test_what_was_not_given_is_absent(inputs, tmp_path, kept, found):
    write_report(tmp_path / "report.html", Inputs(**{kept: getattr(inputs, kept)}))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert headings(page) == ["What was measured", *found]


def test_the_same_inputs_give_the_same_bytes_and_a_date_only_where_given(inputs, tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, inputs)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_report(tmp_path / "dated", inputs, date="2025-01-31")
    dated = (tmp_path / "dated").read_text("utf-8")
    assert dated.replace(", <bdi>2025-01-31</bdi>", "") == (tmp_path / "a").read_text("utf-8")


def test_nothing_is_fetched(page):
    assert not re.search(r"(src|href|action)\s*=\s*[\"']?\s*(https?:)?//", page)
    assert not re.search(r"(url\(|@import)\s*[\"']?\s*(https?:)?//", page)
    assert set(re.findall(r'href="([^#"][^"]{0,15})', page)) <= {"data:,", "data:image/png;b"}
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_one_script_that_runs_is_the_one_allowed(page):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_a_label_is_text_wherever_it_stands(inputs, tmp_path):
    hostile = replace(inputs, neurons={SCRIPT: inputs.neurons["lape"]})
    write_report(tmp_path / "report.html", hostile, title=SCRIPT, date=SCRIPT)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert f"<bdi>{html.escape(SCRIPT)}</bdi></td>" in page
    assert page.count("<script") == page.count("</script>") == 1 + page.count("<figure")
    grids = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert any(SCRIPT in str(json.loads(one)) for one in grids)


def test_no_two_elements_have_one_id_and_every_reference_is_met(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert references
    assert set(references) <= set(ids)


def test_every_figure_has_a_caption_a_description_and_its_data(page):
    figures = re.findall("<figure.*?</figure>", page, re.DOTALL)
    assert len(figures) == 19
    for figure in figures:
        (svg,) = re.findall("<svg.*?</svg>", figure, re.DOTALL)
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 40
        assert len(re.findall("<figcaption>[^<]{40,}</figcaption>", figure)) == 1
        assert "<details>" in figure
        assert "<table>" in figure


def test_text_and_axes_take_the_pages_colour(page):
    svgs = "".join(re.findall("<svg.*?</svg>", page, re.DOTALL))
    assert "#000000" not in svgs
    assert "stroke: currentColor" in svgs


def test_a_label_keeps_its_script_where_this_machine_has_no_font(page):
    svgs = "".join(re.findall("<svg.*?</svg>", page, re.DOTALL))
    assert "中文" in svgs
    assert "\\u4e2d" not in svgs


def test_files_and_models_are_named_without_their_directories(inputs, tmp_path):
    inputs.profile.metadata["model"] = "/home/me/models/tiny"
    write_report(tmp_path / "report.html", inputs)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "0.txt" in page
    assert "<title>Language-specific neurons of tiny</title>" in page
    assert "/home/me" not in page


def test_commands_are_those_that_the_settings_tell(page):
    commands = re.findall("<code>(.*?)</code>", page)
    profile, identify, evaluate = (html.unescape(re.sub("<.*?>", "", one)) for one in commands)
    assert profile.startswith("lapefast profile some/model --corpus=en=0.txt ")
    assert f"'--corpus={SCRIPT}=3.txt' --threshold=0.0 -o p.safetensors" in profile
    rates = "--top-rate=0.2 --filter-rate=0.5 --activation-bar-ratio=0.6 --form=paper"
    assert identify == f"lapefast identify p.safetensors {rates} -o n.json"
    assert evaluate == "lapefast evaluate MODEL --neurons n.json -o m.json"


def test_figures_are_written_beside_the_page(inputs, tmp_path):
    written = write_report(
        tmp_path / "r.html", Inputs(matrix=inputs.matrix), figures=tmp_path / "f"
    )
    assert written[0] == tmp_path / "r.html"
    assert {path.name for path in written[1:]} == {"matrix.png", "matrix.svg", "matrix.csv"}
    assert all(path.stat().st_size for path in written)


def test_a_bar_is_of_all_drawings(inputs, tmp_path, monkeypatch):
    bars = []

    def bar(**options):
        bars.append(tqdm(**options, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr("lapefast.report.page.tqdm", bar)
    given = Inputs(matrix=inputs.matrix, neurons=inputs.neurons)
    figures = sum(len(section.figures) for section in sections(given))
    write_report(tmp_path / "r.html", given)
    write_report(tmp_path / "r.html", given, figures=tmp_path / "f")
    assert [(bar.n, bar.total) for bar in bars] == [(n, n) for n in (figures, 2 * figures)]


def test_figures_of_several_methods_carry_their_names(inputs):
    found = {name: inputs.neurons["lape"] for name in ("lape", "a/b", "a b", "中文", "../..")}
    names = [one.name for section in sections(Inputs(neurons=found)) for one in section.figures]
    suffixes = ["lape", "a-b", "a-b-3", "4", "5"]
    assert [one for one in names if one.startswith("neurons")] == [f"neurons-{s}" for s in suffixes]


def test_texts_of_every_input_are_listed(inputs):
    documents = [
        {"label": label, "source": "v.txt", "documents": 9, "longer": 2, "empty": 1}
        for label in LABELS[:2]
    ]
    inputs.neurons["plnd"].metadata |= {"corpora": documents, "longer": "cut"}
    inputs.experts.metadata |= {"corpora": documents[:1] * 2, "longer": "drop"}
    table = sections(inputs)[0].tables["Texts"]
    names = ["tokens", "prompts", "documents", "empty texts", "longer documents"]
    assert table.header == ["of", "label", *names, "corpora"]
    assert table.rows == [
        *(
            ["profile", label, 1000, None, None, None, None, f"{at}.txt"]
            for at, label in enumerate(LABELS)
        ),
        *(["plnd", label, None, None, 9, 1, "2 cut", "v.txt"] for label in LABELS[:2]),
        *(["matrix", label, 9, None, None, None, None, None] for label in LABELS),
        *(["sweep", label, None, 8, None, None, None, None] for label in LABELS),
        ["experts in full", LABELS[0], None, None, 18, 2, "4 dropped", "v.txt"],
        *(["pruning", label, 9, None, None, None, None, None] for label in LABELS),
    ]
    both = replace(inputs, neurons={"experts": NeuronSets({}, inputs.neurons["plnd"].layout)})
    both.neurons["experts"].metadata |= {"corpora": inputs.experts.metadata["corpora"]}
    rows = sections(both)[0].tables["Texts"].rows
    assert [row[0] for row in rows if "experts" in row[0]] == ["experts"]
    inputs.sweep.metadata["prompts_source"] = "p.jsonl"
    rows = sections(Inputs(sweep=inputs.sweep))[0].tables["Texts"].rows
    assert rows == [["sweep", label, 8, "p.jsonl"] for label in LABELS]
    table = sections(Inputs(matrix=inputs.matrix))[0].tables["Texts"]
    assert table.header == ["of", "label", "tokens"]


def test_empty_neuron_sets_are_a_sentence(neurons):
    (_, section) = sections(Inputs(neurons={"x": NeuronSets({"en": {}, "zh": {}}, neurons.layout)}))
    assert section.text == "No neuron belongs to any label here."
    assert not section.figures


def test_a_single_label_is_not_compared_with_itself(neurons, experts):
    one = Experts(["en"], experts.clusters, experts.chosen[:1], experts.tokens[:1])
    given = Inputs(neurons={"x": NeuronSets({"en": neurons["en"]}, neurons.layout)}, experts=one)
    assert [f.name for s in sections(given) for f in s.figures] == ["neurons", "experts"]


def test_nothing_to_report_is_refused(tmp_path):
    with pytest.raises(InputError, match="give a profile or neurons"):
        write_report(tmp_path / "report.html", Inputs())
    assert not list(tmp_path.iterdir())


def test_inputs_of_two_models_are_refused(inputs, tmp_path):
    inputs.matrix.metadata["fingerprint"] = "0" * 64
    with pytest.raises(InputError, match="profile and matrix are of two"):
        write_report(tmp_path / "report.html", inputs)


def test_what_lape_chose_needs_its_parameters(profile, neurons, tmp_path):
    other = NeuronSets(neurons, neurons.layout, {"method": "lape"})
    with pytest.raises(InputError, match="the neurons a lack LAPE's parameters; identify them"):
        write_report(tmp_path / "report.html", Inputs(profile, {"a": other}))
    assert not list(tmp_path.iterdir())


def test_sharing_is_drawn_by_threshold_and_for_what_contributes_most(sharing, tmp_path):
    generator = torch.Generator().manual_seed(5)
    swept = torch.randint(0, 9, (3, 3, 4), generator=generator)
    mean = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) / 4
    spread = Spread(LABELS[:2], torch.tensor([5, 5]), mean, mean * 0.5, mean * 1.5)
    scores = Spread(LABELS[:2], torch.tensor([5, 5]), 40 * mean - 5, 20 * mean - 9, 60 * mean)
    given = replace(
        sharing,
        thresholds=[0.0, 0.1, 0.25],
        sweep_counts=swept,
        contribution=spread,
        effective=scores,
    )
    (drawn,) = [s for s in sections(Inputs(sharing=given)) if s.title == "Sharing"]
    figures = {figure.name: figure for figure in drawn.figures}
    names = ["sharing", "sharing-thresholds", "sharing-contribution", "sharing-effective"]
    assert list(figures) == names
    shares = given.sweep.mean(1)
    rows = [row for row in figures["sharing-thresholds"].table.rows if row[1] == "specific"]
    assert [row[0] for row in rows] == ["0", "0.1", "0.25"]
    assert [row[2] for row in rows] == pytest.approx(shares[:, 2].tolist())
    rows = [row for row in figures["sharing-contribution"].table.rows if row[1] == "all-shared"]
    assert [row[2] for row in rows] == pytest.approx(spread.over_labels()[0][:, 0].tolist())
    effective = figures["sharing-effective"]
    rows = [row for row in effective.table.rows if row[1] == "all-shared"]
    assert [row[2] for row in rows] == pytest.approx(scores.over_labels()[0][:, 0].tolist())
    least, largest = (of.min().item() for of in (scores.least, -scores.largest))
    for axes in effective.draw(True).axes:
        assert axes.get_ylim()[0] <= least
        assert axes.get_ylim()[1] >= -largest
    for figure in figures.values():
        figure.save(tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_matrix_of_pruning_is_not_taken_for_one_of_neurons(matrix, pruning, tmp_path):
    for given in (Inputs(matrix=pruning), Inputs(pruning=matrix)):
        with pytest.raises(InputError, match="the other way"):
            write_report(tmp_path / "report.html", given)


def test_pruning_stands_beside_its_baselines(pruning):
    changes, own = sections(Inputs(pruning=pruning))[1].figures
    assert changes.title == "Change of perplexity by pruning"
    assert "25% of the experts are pruned" in changes.caption
    assert changes.grids[0].rows[0] == f"pruned for {LABELS[0]}"
    assert own.table.header[:4] == ["label", "unpruned", "pruned", "random experts"]
    at = pruning.rows.index(LABELS[2]), pruning.columns.index(LABELS[2])
    nll = pruning.nll[0, at[1]], pruning.nll[at], pruning.random_nll[at]
    ends = pruning.random_range[at]
    assert own.table.rows[2][0] == LABELS[2]
    assert own.table.rows[2][1:] == pytest.approx([float(one.exp()) for one in (*nll, *ends)])


def test_sampled_languages_stand_beside_random_sets(sampled):
    (figure,) = sections(Inputs(sampled=sampled))[1].figures
    assert figure.table.rows[1] == [LABELS[1], "en", 0.125, 0.25, 0.3125, 0.25, 0.375]
    assert figure.grids[0].values[1] == "before 12.5%, after 25.0%, random 25.0% to 37.5%"
    bars = figure.draw(True).axes[0].containers
    assert [[bar.get_height() for bar in of] for of in bars[:2]] == [
        [12.5] * 4,
        [12.5, 25, 37.5, 50],
    ]


def test_answers_without_a_category_stand_beside_random_sets(deactivation):
    accuracy, nll = sections(Inputs(deactivation=deactivation))[1].figures
    assert accuracy.table.rows[0] == ["none", LABELS[0], 4, 8, 0.0, 1.0, None, None]
    assert accuracy.grids[0].values == ["100.0%", "50.0%, random 25.0% to 75.0%"]
    assert nll.grids[0].values == ["1", "2, random 0.25 to 0.75"]


def test_labels_weigh_by_their_answers_or_the_tokens_of_these(deactivation):
    of_one = [row for row in deactivation.rows if row.label == LABELS[0]]
    other = [replace(one, label="b", answers=12, tokens=8 * 4, nll=0, accuracy=0) for one in of_one]
    found = CategoryDeactivation([*of_one, *other])
    accuracy, nll = (deactivations(found, what, what) for what in ("accuracy", "nll"))
    assert accuracy.grids[0].values[0] == "25.0%"
    assert nll.grids[0].values[0] == "0.2"


def test_families_stand_beside_labels_that_are_codes(experts):
    labels = ["de", "xx", "zh", "en"]
    named = Experts(labels, experts.clusters, experts.chosen, experts.tokens)
    similarity = sections(Inputs(experts=named))[1].figures[1]
    order = named.order()
    families = {"de": "Germanic", "en": "Germanic", "zh": "Sino-Tibetan", "xx": None}
    shown = [f"{families[one]}: {one}" if families[one] else one for one in order]
    assert similarity.grids[0].rows == shown
    (row,) = [row for row in similarity.table.rows if {row[0], row[1]} == {"de", "zh"}]
    assert row[3:] == [families[row[0]], families[row[1]]]
