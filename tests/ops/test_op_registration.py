"""Every op is declared, checked, faked and differentiated as PyTorch asks."""

from __future__ import annotations

import pytest
import torch
from op_cases import LAYOUTS, Tally, edits_for

from lapefast import ops


def _profile(gate, up):
    tally = Tally(2, gate.shape[-1])
    return torch.ops.lapefast.profile.default, (gate, up, "silu", 0.5, None, *tally.arguments())


def _profile_(gate, up):
    tally = Tally(2, gate.shape[-1])
    # Rows that it writes over are one stride apart.
    gate, up = (one.detach()[:, 0] if one.dim() == 3 else one.detach() for one in (gate, up))
    return ops.profile_, (gate, up, "silu", 0.0, None, *tally.arguments())


def _observe(gate, up):
    tally = Tally(2, gate.shape[-1])
    groups = torch.ones(1, dtype=torch.int32)
    return ops.observe, (gate, "identity", 0.0, groups, *tally.observed())


def _edit(gate, up):
    tables = edits_for(gate.shape[-1]).tables()
    flags = torch.zeros(2, dtype=torch.int64)
    sets = torch.zeros(1, dtype=torch.int32)
    return ops.edit, (gate, up, "relu", sets, *tables, flags)


def _leave_one_out(gate, up):
    # A head's rows are those of the layout; opcheck can't copy a narrowed view of nothing.
    query, key = (
        torch.empty(1, 0, 4) if one.numel() == 0 else one.detach()[..., :4] for one in (gate, up)
    )
    query, key = (one if one.dim() == 3 else one[None] for one in (query, key))
    heads, rows = query.shape[:2]
    return ops.leave_one_out, (query, key, torch.zeros(heads, rows, rows), 0.5)


CASES = {
    "profile": _profile,
    "profile_": _profile_,
    "observe": _observe,
    "edit": _edit,
    "leave_one_out": _leave_one_out,
}


def test_every_registered_op_has_a_case():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lapefast::")
    }
    assert registered == set(CASES)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "fused", "empty", "one row"])
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck_passes(op, layout, needs_gradient):
    gate, up = LAYOUTS[layout](torch.float32)
    if needs_gradient:
        # Of the views' base, so that the layout stays what it is.
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    overload, arguments = CASES[op](gate, up)
    torch.library.opcheck(overload, arguments)
