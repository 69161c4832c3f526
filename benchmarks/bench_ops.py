"""The ops beside eager PyTorch, and the cost of one small call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from baselines.published import published_expression
from inputs import EDITED, edits, gate_and_up, moved
from timing import input_sets

from lapefast import ops

_ON_CPU = pytest.mark.only_on("cpu", reason="a size and bar of the CPU; a GPU has its own")
_ON_GPU = pytest.mark.only_on("cuda", reason="a size and bar of a GPU; `make gpu` measures it")
_PROFILED = [
    *(pytest.param(*size, marks=_ON_CPU) for size in ((512, 11008), (4096, 1024))),
    *(pytest.param(8192, width, marks=_ON_GPU) for width in (8192, 11008, 14336, 28672)),
]
_BARS = {
    "cpu": {"eager": 1.3, "published": 8, "sums": 1.1},
    "cuda": {"published": 3, "counting": 1.02, "share": 88},
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("rows", "width"), _PROFILED)
def test_profile_op(backend, contest, report, limits, device, quick, rows, width):
    if quick:
        rows, width = 16, width // 64
    gate, up = gate_and_up(rows, width, device)
    counts = torch.zeros(1, width, dtype=torch.int64, device=device)
    over_zero, sums = torch.zeros_like(counts[0]), torch.zeros_like(counts, dtype=torch.float64)
    flags = torch.zeros(2, dtype=torch.int64, device=device)

    def profile(gate, up, counts=None, sums=None):
        return ops.profile(
            gate, up, "silu", 0.0, None, counts, sums, None, None, flags, backend=backend
        )

    def check():
        expected = published_expression(gate, up, over_zero)
        assert torch.equal(profile(gate, up, counts), expected)
        assert torch.equal(counts[0], over_zero)
        assert torch.equal(profile(gate, up), expected)
        assert torch.equal(profile(gate, up, None, sums), expected)
        activation = F.silu(gate).double()
        # 64 additions in float32 err by at most 64 roundings of all magnitudes together.
        bound = 64 * 2**-24 * activation.abs().sum(0)
        assert ((sums[0] - activation.sum(0)).abs() <= bound).all()

    what, bars = f"profile op ({backend}), bf16 [{rows}, {width}]", _BARS[device]
    timings = contest(
        what,
        {
            "lapefast": lambda gate, up: profile(gate, up, counts),
            "lapefast with sums": lambda gate, up: profile(gate, up, counts, sums),
            "lapefast without counting": profile,
            "eager silu(gate) * up": lambda gate, up: F.silu(gate) * up,
            "the published expression": lambda gate, up: published_expression(gate, up, over_zero),
        },
        input_sets(gate, up),
        check,
        rounds=41,
        repeat=3,
        moved=moved(gate),
        lead_in=True,
    )
    report.row(
        f"{what}: eager silu(gate) * up takes",
        timings.ratio("eager silu(gate) * up", "lapefast"),
        "x as long",
        at_least=bars.get("eager"),
    )
    report.row(
        f"{what}: the published expression",
        timings.ratio("the published expression", "lapefast"),
        "x as long",
        at_least=bars["published"],
    )
    report.row(
        f"{what}: with sums",
        timings.ratio("lapefast with sums", "lapefast"),
        "x as long",
        at_most=bars.get("sums"),
    )
    report.row(
        f"{what}: times itself without counting",
        timings.ratio("lapefast", "lapefast without counting"),
        "x",
        at_most=bars.get("counting"),
    )
    report.row(
        f"{what}: share of the copy's bandwidth",
        [100 * moved(gate) / seconds / limits.bytes for seconds in timings["lapefast"]],
        "%",
        at_least=bars.get("share"),
    )


# One row per prompt token under one edit, one decoded token, and as many as their requests' edits.
@pytest.mark.parametrize(
    ("rows", "width", "sets"), [(512, 11008, 1), (1, 14336, 1), (64, 14336, 64)]
)
def test_edit_op(backend, contest, report, device, quick, rows, width, sets):
    if quick:
        width //= 64
    gate, up = gate_and_up(rows, width, device)
    given = edits(rows, width, device, sets)

    def edit(gate, up, backend=backend):
        return ops.edit(gate, up, "silu", *given, backend=backend)

    def check():
        assert torch.equal(edit(gate, up), edit(gate, up, backend="reference"))

    what = f"edit op ({backend}), bf16 [{rows}, {width}], {sets} sets, {EDITED:.0%} edited"
    timings = contest(
        what,
        {"lapefast": edit, "eager silu(gate) * up, unedited": lambda gate, up: F.silu(gate) * up},
        input_sets(gate, up),
        check,
        rounds=41,
        repeat=3 if rows > 64 else 100,
        moved=moved(gate),
        lead_in=True,
    )
    report.row(
        f"{what}: times the eager product unedited",
        timings.ratio("lapefast", "eager silu(gate) * up, unedited"),
        "x",
    )


@pytest.mark.only_on("cpu", reason="on a GPU a call's cost is its launch, which graphs take away")
def test_one_small_call(contest, report, device):
    gate, up = gate_and_up(1, 64, device)
    counts = torch.zeros(1, 64, dtype=torch.int64, device=device)
    flags = torch.zeros(2, dtype=torch.int64, device=device)

    def profile(gate, up):
        return ops.profile(gate, up, "silu", 0.0, None, counts, None, None, None, flags)

    def check():
        assert torch.equal(profile(gate, up), F.silu(gate) * up)

    contenders = {"lapefast": profile, "eager silu(gate) * up": lambda gate, up: F.silu(gate) * up}
    timings = contest(
        "one call, bf16 [1, 64]", contenders, [(gate, up)], check, rounds=21, repeat=2000
    )
    report.row(
        "one call, bf16 [1, 64]: one op call on [1, 64]", timings["lapefast"], "s", at_most=9e-6
    )
