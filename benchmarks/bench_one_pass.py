"""One pass that feeds three methods, against a pass for each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lapefast as lf
from lapefast.detect.experts.use import ExpertUse
from lapefast.models import find_sites
from lapefast.models.bare import bare_model

_DOCUMENTS, _LENGTH, _EXPERTS = 8, 256, 16


@pytest.mark.only_on("cpu", reason="the passes are compared where they are measured")
def test_one_pass_feeds_three_methods(llama, contest, report, device, quick):
    """LAPE's counts, PLND's FFN scores and experts, on padded documents, each its own group."""
    model, bare = llama.model, bare_model(llama.model)
    generator = torch.Generator().manual_seed(0)
    length = 16 if quick else _LENGTH
    lengths = torch.randint(length // 2, length + 1, (_DOCUMENTS,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(model.config.vocab_size, (_DOCUMENTS, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    groups = torch.where(mask, torch.arange(_DOCUMENTS)[:, None], -1)
    labels = [str(number) for number in range(_DOCUMENTS)]
    clusters = _clusters(model)
    found: dict[str, Tensor] = {}

    def run(*statistics: str, experts: bool = False) -> None:
        placed = [lf.record(model, labels, statistics)] if statistics else []
        placed += [ExpertUse(model, labels, clusters)] if experts else []
        for one in placed:
            one.__enter__()
            one.set(groups=groups)
        bare(**inputs)
        for one in placed:
            one.__exit__(None, None, None)
        if statistics:
            profile = placed[0].profile()
            for name in statistics:
                found[name] = torch.stack([*getattr(profile, name).values()])
        if experts:
            found["experts"] = placed[-1].frequency()

    def together() -> None:
        run("counts", "square_sums", experts=True)

    def apart() -> None:
        run("counts")
        run("square_sums")
        run(experts=True)

    def check() -> None:
        apart()
        expected = dict(found)
        found.clear()
        together()
        assert set(found) == set(expected) == {"counts", "square_sums", "experts"}
        for name, values in expected.items():
            assert torch.equal(found[name], values), name

    with torch.no_grad():
        what = f"three methods on {_DOCUMENTS} documents of up to {length} tokens"
        timings = contest(
            what, {"one pass": together, "three passes": apart}, [()], check, rounds=7
        )
    ratios = timings.ratio("three passes", "one pass")
    report.row(f"{what}: three passes", ratios, "x as long", at_least=2)


def _clusters(model) -> dict[str, Tensor]:
    """Experts of equal size; which neurons they hold costs the same, so none are searched for."""
    return {site.name: torch.arange(site.width) % _EXPERTS for site in find_sites(model)}
