"""PLND's query and key scores against its formula written out, in time and in memory."""

from __future__ import annotations

import pytest
import torch
from processes import run_alone
from torch import Tensor

from lapefast import ops

_HEADS, _SIZE, _LENGTH = 16, 64, 256  # H * D = 1024

# A layer of H * D = 4096 at T = 512, whose maps without each dimension would be 4 GiB of float32.
_RUN = """
import sys, torch, lapefast
from lapefast import ops
scored, length = sys.argv[1] == "scored", int(sys.argv[2])
heads, size = 32, 128
query, key = torch.randn(heads, length, size), torch.randn(8, length, size)
logits = query @ key.repeat_interleave(4, 0).transpose(1, 2) * size**-0.5
logits.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
if scored:
    assert bool(ops.leave_one_out(query, key, logits, size**-0.5).isfinite().all())
print(0.0)
"""


def broadcast(query: Tensor, key: Tensor, logits: Tensor, factor: float) -> Tensor:
    """The formula as one would write it: every map without every dimension, [H, D, T, T]."""
    taken = query.transpose(1, 2)[..., None] * key.transpose(1, 2)[:, :, None] * factor
    change = (logits[:, None] - taken).softmax(-1) - logits.softmax(-1)[:, None]
    return change.square().sum((-1, -2))


def test_query_and_key_scores(contest, report, device, quick):
    heads = 2 if quick else _HEADS
    generator = torch.Generator().manual_seed(0)
    shape = (heads, _LENGTH, _SIZE)
    query, key = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    factor = _SIZE**-0.5
    logits = query @ key.transpose(1, 2) * factor
    later = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=device).triu(1)
    given = (query, key, logits.masked_fill(later, -torch.inf), factor)

    def check():
        found, expected = ops.leave_one_out(*given).float(), broadcast(*given)
        # Each map is off by a few spacings of its norm, at most the root of its rows.
        slack = 8 * torch.finfo(torch.float32).eps * _LENGTH**0.5
        torch.testing.assert_close(found.sqrt(), expected.sqrt(), rtol=1e-6, atol=slack)

    what = f"PLND query and key scores, H*D = {heads * _SIZE}, T = {_LENGTH}"
    timings = contest(
        what,
        {"lapefast": ops.leave_one_out, "broadcast formula": broadcast},
        [given],
        check,
        rounds=7,
        repeat=1,
    )
    ratios = timings.ratio("broadcast formula", "lapefast")
    bar = {"at_least": 5} if device == "cpu" else {}
    report.row(f"{what}: the broadcast formula", ratios, "x as long", **bar)


@pytest.mark.only_on("cpu", reason="the memory of a process is the CPU's")
def test_memory_of_query_and_key_scores(report, quick, benchmark):
    """Beside inputs and interpreter, by the difference of two processes."""
    length = 64 if quick else 512
    peaks = {}

    def measure() -> None:
        for kind in ("scored", "plain"):
            peaks[kind] = run_alone(_RUN, kind, length)[1]

    benchmark.pedantic(measure, rounds=1, iterations=1)
    added = (peaks["scored"] - peaks["plain"]) / 2**30
    report.row("PLND scores, H*D = 4096, T = 512: memory added", [added], " GiB", at_most=1)
