"""Which addresses the kernels touch, recorded in Triton's interpreter.

It runs one program after another, so that a store where another program stores goes unseen in the
results, and a load past the end of a tensor mostly does too.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from op_cases import LAYOUTS, Tally, edits_for, row_groups

from lapefast import ops


@pytest.fixture
def touched(interpreter, monkeypatch):
    """Addresses loaded, stored and added to: {kind: Counter of first bytes}."""
    found = {kind: Counter() for kind in ("load", "store", "add")}
    builder = interpreter.InterpreterBuilder

    def record(kind: str, name: str, pointer_at: int, mask_at: int) -> None:
        run = getattr(builder, name)

        def recorded(self, *arguments):
            pointers, mask = arguments[pointer_at].data, arguments[mask_at].data
            found[kind].update(pointers[mask].tolist())
            return run(self, *arguments)

        monkeypatch.setattr(builder, name, recorded)

    record("load", "create_masked_load", 0, 1)
    record("store", "create_masked_store", 0, 2)
    record("add", "create_atomic_rmw", 1, 3)
    return found


def addresses(*tensors: torch.Tensor) -> set[int]:
    """Of every element of these tensors and no other."""
    found = set()
    for tensor in tensors:
        offsets = torch.zeros(tensor.shape, dtype=torch.int64)
        for dimension, stride in enumerate(tensor.stride()):
            along = torch.arange(tensor.shape[dimension]) * stride
            offsets += along.reshape([-1] + [1] * (tensor.dim() - 1 - dimension))
        at = tensor.data_ptr() + offsets.flatten() * tensor.element_size()
        found.update(at.tolist())
    return found


HOSTILE = [0, 2**31 - 1, -(2**31), -2, 3, 1, -1]


@pytest.mark.parametrize("layout", ["fused", "unaligned", "narrow", "tiles"])
@pytest.mark.parametrize("hostile", [False, True])
def test_profile_touches_its_tensors_only_and_stores_once(layout, hostile, touched):
    gate, up = LAYOUTS[layout](torch.bfloat16)
    gate, up = gate.flatten(0, -2)[:40], up.flatten(0, -2)[:40]
    tally = Tally(3, gate.shape[-1])
    groups = row_groups(len(gate), 3)
    if hostile:
        groups = torch.tensor(HOSTILE * 6, dtype=torch.int32)[: len(gate)]
    product = ops.profile(gate, up, "relu", 0.0, groups, *tally.arguments(), backend="triton")
    assert set(touched["load"]) == addresses(gate, up, groups)
    assert set(touched["store"]) == addresses(product)
    assert set(touched["store"].values()) == {1}
    assert set(touched["add"]) <= addresses(*tally.arguments())


@pytest.mark.parametrize("layout", ["fused", "unaligned", "narrow", "tiles"])
@pytest.mark.parametrize("hostile", [False, True])
def test_edit_touches_its_tensors_only_and_stores_once(layout, hostile, touched):
    gate, up = LAYOUTS[layout](torch.bfloat16)
    gate, up = gate.flatten(0, -2)[:40], up.flatten(0, -2)[:40]
    offsets, neurons, scale, shift = edits_for(gate.shape[-1]).tables()
    sets = (torch.arange(len(gate)) % 5 - 1).to(torch.int32)
    if hostile:
        capacity = neurons.numel()
        offsets = torch.tensor([5, -(2**31), 3, 2**31 - 1, capacity + 9], dtype=torch.int32)
        neurons = torch.tensor(HOSTILE * capacity, dtype=torch.int32)[:capacity]
    flags = torch.zeros(2, dtype=torch.int64)
    tables = offsets, neurons, scale, shift
    product = ops.edit(gate, up, "relu", sets, *tables, flags, backend="triton")
    assert set(touched["load"]) <= addresses(gate, up, sets, *tables)
    assert set(touched["store"]) == addresses(product)
    assert set(touched["store"].values()) == {1}
    assert set(touched["add"]) <= addresses(flags)
