"""The figure of stability, alone and in a report."""

from __future__ import annotations

import shlex

import pytest
import torch
import typer
from report_inputs import LABELS

from lapefast.cli import app
from lapefast.evaluate import Stability
from lapefast.neurons.layout import Layout
from lapefast.profiles import SHARDS, Profile
from lapefast.report import Inputs, draw_stability
from lapefast.report.commands import commands
from lapefast.report.figures.stability import overlaps
from lapefast.report.sections import sections


@pytest.fixture
def found() -> Stability:
    generator = torch.Generator().manual_seed(0)
    values = 0.8 + 0.2 * torch.rand(20, 3, 4, dtype=torch.float64, generator=generator)
    tokens = torch.tensor([[1000], [2000], [4000]]) * torch.tensor([1, 2, 3, 4])
    return Stability(LABELS, tokens, torch.tensor([4, 5, 6, 7]), values, Layout(("a",)))


@pytest.fixture
def in_shards(profile) -> Profile:
    """The report's profile, its counts dealt to shards as evenly as can be."""
    more = torch.arange(SHARDS)[None, :, None]
    shards = {site: (of[:, None] + more) // SHARDS for site, of in profile.counts.items()}
    tokens = (profile.tokens[:, None] + more[..., 0]) // SHARDS
    statistics = {
        "counts": profile.counts,
        "shard_counts": {site: of.int() for site, of in shards.items()},
    }
    stacks = profile.stack_tokens
    return Profile(LABELS, profile.site_info, stacks, statistics, profile.metadata,
                   shard_tokens={"decoder": tokens})  # fmt: skip


def test_overlaps_stand_at_their_labels_tokens_with_their_interval(found):
    figure = overlaps(found)
    assert figure.table.header == ["label", "tokens", "expected", "least", "largest"]
    assert [row[:2] for row in figure.table.rows[3:6]] == [
        [LABELS[1], n] for n in (2000, 4000, 8000)
    ]
    for label, row in zip(LABELS, figure.table.rows[2::3], strict=True):
        assert row[3] == found.announced[label]
    assert len(figure.grids) == 4
    assert figure.grids[3].columns == ["4,000 tokens", "8,000 tokens", "16,000 tokens"]
    least, largest = found.interval[0, 3].tolist()
    said = f"{found.expected[0, 3]:.3f} ({least:.3f} to {largest:.3f})"
    assert figure.grids[3].values[0] == said


def test_each_label_has_a_panel_of_its_line_and_band(found):
    panels = overlaps(found).draw(True).axes
    assert len(panels) == 4
    for row, axes in enumerate(panels):
        (line,) = axes.lines
        assert line.get_ydata().tolist() == found.expected[:, row].tolist()
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        ends = found.interval[:, row]
        assert (band.min(), band.max()) == pytest.approx((float(ends.min()), float(ends.max())))


def test_it_is_drawn_as_png_and_svg(found, tmp_path):
    written = draw_stability(found, tmp_path / "stability.png")
    assert [path.name for path in written] == ["stability.png", "stability.svg"]
    assert "16,000" in written[1].read_text("utf-8")


def test_a_report_draws_it_where_there_are_shards(profile, in_shards, neurons):
    def names(given: Inputs) -> list[str]:
        return [figure.name for section in sections(given) for figure in section.figures]

    assert "stability" in names(Inputs(profile=in_shards))
    assert "stability" in names(Inputs(profile=in_shards, neurons={"lape": neurons}))
    assert "stability" not in names(Inputs(profile=profile))


@pytest.mark.parametrize("reached", [True, False])
def test_the_command_of_a_profile_that_was_read_until_stable_is_taken(reached):
    about = {
        "model": "m",
        "corpora": [{"label": label, "source": f"{label}.txt", "tokens": 512, "capped": True}
                    for label in ("en", "zh")],
        "until_stable": {"overlap": 0.95, "reached": reached, "parameters": {"top_rate": 0.05}},
    }  # fmt: skip
    (line,) = commands({"profile": about}, {"profile": "p.safetensors"})
    _, command, *arguments = shlex.split(line)
    given = typer.main.get_command(app).commands[command].make_context(command, arguments).params
    assert given["until_stable"] == 0.95
    assert given["top_rate"] == 0.05
    # A pass that stopped by itself was not stopped by a number of tokens.
    assert given["max_tokens"] == (None if reached else 512)
