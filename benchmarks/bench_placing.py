"""What it takes to place an edit in a model and to take it out, which a request of its own pays."""

from __future__ import annotations

import torch
from inputs import EDITED
from models import TINY, Shape, build

import lapefast as lf
from lapefast.models import find_sites

# As many modules as a model of 8 billion parameters has; narrow, so that their search is what
# takes the time.
_SHAPE = Shape("32 layers of width 64", 1, 1, 64, 256, 32, 4, 4, 1024)


def test_place_and_remove(contest, device, quick):
    """Beside one forward pass of one token: placing proves itself by a pass that computes twice."""
    shape = TINY if quick else _SHAPE
    model = build(shape, device, torch.float32).model
    ids = torch.ones(1, 1, dtype=torch.int64, device=device)
    edit = lf.deactivate(
        {site.name: list(range(round(EDITED * site.width) or 1)) for site in find_sites(model)}
    )

    def place_and_remove() -> None:
        with lf.steer(model, edit):
            pass

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(ids).logits

    def check() -> None:
        unedited = run()
        with lf.steer(model, edit):
            assert not torch.equal(run(), unedited)
        assert torch.equal(run(), unedited)

    contest(
        f"an edit in {shape.name}",
        {"placed and removed": place_and_remove, "one forward pass of the unpatched model": run},
        [()],
        check,
    )
