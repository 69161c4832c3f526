"""How the ops' time grows with each thing it may grow with; `figures.py` draws the curves."""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.nn.functional as F
from inputs import edits, gate_and_up
from timing import input_sets

from lapefast import ops

_SIZE = {"cpu": (512, 4096), "cuda": (8192, 8192)}  # rows and width, where they are not varied
_DECODED = 256  # rows of a batch whose sequences have edits of their own
_THREADS = [1 << n for n in range((os.cpu_count() or 1).bit_length())]
_PROFILE = {
    "tokens": [1, 4, 16, 64, 256, 1024, 4096, 16384],
    "width": [64, 256, 1024, 4096, 8192, 14336, 28672],
    "threads": _THREADS,
    "labels in a batch": [1, 2, 4, 8, 16, 32, 64],
}
_EDIT = {
    "edit sets": [1, 4, 16, 64, 256],
    "share of neurons edited": [0.001, 0.01, 0.1, 0.5, 1.0],
}


def _points(curves):
    of_the_cpu = pytest.mark.only_on("cpu", reason="threads are the CPU's")
    return [
        pytest.param(curve, x, marks=[of_the_cpu] if curve == "threads" else [])
        for curve, values in curves.items()
        for x in values
    ]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def measure(backend, contest):
    """measure(curve, x, gate, up, op) times ``op`` by ``backend`` beside the eager product."""

    def run(curve, x, gate, up, op, check):
        contest(
            f"{curve} {x}",
            {
                f"lapefast ({backend})": lambda gate, up: op(gate, up, backend),
                "eager product": lambda gate, up: F.silu(gate) * up,
            },
            input_sets(gate, up),
            check,
            rounds=15,
            # Small calls are timed in bulk: a clock read would be a part of one.
            repeat=max(1, min(200, (1 << 22) // gate.numel())),
            lead_in=True,
            point={"curve": curve, "x": x},
        )

    return run


@pytest.mark.parametrize(("curve", "x"), _points(_PROFILE))
def test_profile_op(measure, request, device, quick, backend, curve, x):
    rows, width = _SIZE[device] if not quick else (16, 64)
    labels = 1
    if curve == "tokens":
        rows = min(x, 64) if quick else x
    elif curve == "width":
        width = min(x, 256) if quick else x
    elif curve == "labels in a batch":
        labels = x
    elif curve == "threads":
        request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(x)
    gate, up = gate_and_up(rows, width, device)
    groups = torch.randint(labels, (rows,), dtype=torch.int32, device=device)
    counts, expected = (
        torch.zeros(labels, width, dtype=torch.int64, device=device) for _ in range(2)
    )
    flags = torch.zeros(2, dtype=torch.int64, device=device)

    def profile(gate, up, backend, counts=counts):
        return ops.profile(
            gate, up, "silu", 0.0, groups, counts, None, None, None, flags, backend=backend
        )

    def check():
        product = profile(gate, up, backend)
        assert torch.equal(product, profile(gate, up, "reference", expected))
        assert torch.equal(counts, expected)

    measure(curve, x, gate, up, profile, check)


@pytest.mark.parametrize(("curve", "x"), _points(_EDIT))
def test_edit_op(measure, device, quick, backend, curve, x):
    rows, width = _SIZE[device] if not quick else (16, 64)
    if curve == "edit sets":
        rows = _DECODED
        given = edits(rows, width, device, sets=x)
    else:
        given = edits(rows, width, device, share=x)
    gate, up = gate_and_up(rows, width, device)

    def edit(gate, up, backend):
        return ops.edit(gate, up, "silu", *given, backend=backend)

    def check():
        assert torch.equal(edit(gate, up, backend), edit(gate, up, "reference"))

    measure(curve, x, gate, up, edit, check)
