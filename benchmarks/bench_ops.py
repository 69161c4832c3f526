"""The profile op beside eager PyTorch, and the cost of one small call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from baselines.published import published_expression
from conftest import ratio

from lapefast import ops

_SIZES = [(512, 11008), (4096, 1024)]


def _tensors(rows: int, width: int):
    torch.manual_seed(0)
    gate, up = (torch.randn(rows, width, dtype=torch.bfloat16) for _ in range(2))
    counts = torch.zeros(1, width, dtype=torch.int64)
    sums = torch.zeros(1, width, dtype=torch.float64)
    return gate, up, counts, sums, torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(("rows", "width"), _SIZES)
def test_profile_op(contest, report, rows, width):
    gate, up, counts, sums, flags = _tensors(rows, width)

    def profile(*statistics):
        return ops.profile(gate, up, "silu", 0.0, None, *statistics, None, None, flags)

    def check():
        over_zero = torch.zeros(width, dtype=torch.int64)
        expected = published_expression(gate, up, over_zero)
        assert torch.equal(profile(counts, None), expected)
        assert torch.equal(counts[0], over_zero)

    over_zero = torch.zeros(width, dtype=torch.int64)
    with torch.no_grad():
        seconds = contest(
            lambda: profile(counts, None),
            {
                "eager": lambda: F.silu(gate) * up,
                "published": lambda: published_expression(gate, up, over_zero),
                "with sums": lambda: profile(counts, sums),
            },
            check,
            rounds=41,
            repeat=3,
        )
    size = f"profile op, bf16 [{rows}, {width}]"
    report(f"{size}: eager silu(gate) * up takes", 1.3, ratio(seconds, "eager"), "x as long")
    report(f"{size}: the published expression", 8, ratio(seconds, "published"), "x as long")
    report(f"{size}: with sums", 1.1, ratio(seconds, "with sums"), "x as long", at_least=False)
    moved = 3 * gate.numel() * gate.itemsize
    report(f"{size}: bytes moved", None, moved / min(seconds["lapefast"]) / 1e9, " GB/s (best)")


def test_one_small_call(contest, report):
    gate, up, counts, _, flags = _tensors(1, 64)

    def profile():
        return ops.profile(gate, up, "silu", 0.0, None, counts, None, None, None, flags)

    def check():
        assert torch.equal(profile(), F.silu(gate) * up)

    with torch.no_grad():
        seconds = contest(profile, {"eager": lambda: F.silu(gate) * up}, check, 21, repeat=2000)
    median = sorted(seconds["lapefast"])[len(seconds["lapefast"]) // 2]
    report("one op call on [1, 64]", 9, median * 1e6, " us", at_least=False)
