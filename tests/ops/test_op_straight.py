"""The straight way gives what the op gives, and leaves to the op what only that can do."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lapefast import ops
from lapefast.errors import InputError
from lapefast.ops import declarations, straight
from lapefast.ops.backends import native

WIDTH = 37


@pytest.fixture(autouse=True)
def _native(backend):
    if backend != "cpu":
        pytest.skip("only the CPU's native library has a straight way")


@pytest.fixture
def calls(monkeypatch):
    """How often the op was taken instead."""
    seen = []
    op = declarations.edit

    def counted(*arguments, **options):
        seen.append(arguments)
        return op(*arguments, **options)

    monkeypatch.setattr(straight.declarations, "edit", counted)
    return seen


def arguments(device, dtype=torch.float32, rows=(5, 3)):
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(*rows, WIDTH, generator=generator).to(dtype) for _ in range(2))
    tables = (
        torch.tensor([0, 3, 5], dtype=torch.int32),
        torch.tensor([0, 8, 36, 1, 2], dtype=torch.int32),
        torch.tensor([0.0, 2.0, 1.0, 0.0, 0.5]),
        torch.tensor([1.5, 0.0, -1.0, 0.0, 2.0]),
        torch.zeros(2, dtype=torch.int64),
    )
    sets = (torch.arange(gate.numel() // WIDTH) % 3 - 1).int()
    return [t.to(device) for t in (gate, up)], [t.to(device) for t in (sets, *tables)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [(5, 3), (1,), (0,), ()])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_it_equals_the_op(dtype, rows, gated, strided, device, backend, calls):
    (gate, up), tables = arguments(device, dtype, rows)
    if strided:
        gate, up = torch.cat([gate, up], dim=-1).split(WIDTH, dim=-1)
    up = up if gated else None
    expected = ops.edit(gate, up, "silu", *tables, backend=backend)
    found = ops.straight_edit(gate, up, "silu", *tables, backend=backend)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert not calls


def test_gradients_go_through_the_op(device, backend, calls):
    (gate, up), tables = arguments(device)
    gate.requires_grad_()
    ops.straight_edit(gate, up, "silu", *tables, backend=backend).sum().backward()
    assert len(calls) == 1
    assert bool((gate.grad != 0).any())
    with torch.no_grad():
        ops.straight_edit(gate, up, "silu", *tables, backend=backend)
    assert len(calls) == 1


def test_a_mode_sees_the_op(device, backend, calls):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    (gate, up), tables = arguments(device)
    with Names():
        ops.straight_edit(gate, up, "silu", *tables, backend=backend)
    assert "lapefast.edit.default" in names


def test_a_subclass_and_a_tracer_get_the_op(device, backend, calls):
    (gate, up), tables = arguments(device)
    with torch.no_grad():
        ops.straight_edit(torch.nn.Parameter(gate), up, "silu", *tables, backend=backend)
    assert len(calls) == 1
    traced = torch.jit.trace(
        lambda gate: ops.straight_edit(gate, up, "silu", *tables, backend=backend) + 0,
        gate, check_trace=False,
    )  # fmt: skip
    other = gate * 2
    assert torch.equal(traced(other), ops.edit(other, up, "silu", *tables, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, u, t: (g, u[:1], t), "edit: up must be"),
        (lambda g, u, t: (g.double(), u.double(), t), "edit: gate must be"),
        (lambda g, u, t: (g, u, [t[0][:4], *t[1:]]), "edit: sets must be"),
        (lambda g, u, t: (g, u, [t[0], t[1].long(), *t[2:]]), "edit: offsets must be"),
        (lambda g, u, t: (g, u, [*t[:3], t[3][:2], *t[4:]]), "edit: scale must be"),
    ],
)
def test_what_is_wrong_is_said_by_the_op(change, message, device, backend):
    (gate, up), tables = arguments(device)
    gate, up, tables = change(gate, up, tables)
    with pytest.raises(InputError, match=message):
        ops.straight_edit(gate, up, "silu", *tables, backend=backend)


def test_a_negative_view_goes_to_the_op(device, backend, calls):
    (gate, up), tables = arguments(device)
    for pair in ((torch._neg_view(gate), up), (gate, torch._neg_view(up))):
        expected = ops.edit(*(one.resolve_neg() for one in pair), "silu", *tables, backend=backend)
        found = ops.straight_edit(*pair, "silu", *tables, backend=backend)
        assert torch.equal(found, expected)


def test_rows_without_one_stride_go_to_the_op(device, backend, calls):
    (gate, up), tables = arguments(device)
    gate, up = (one.transpose(0, 1).contiguous().transpose(0, 1) for one in (gate, up))
    found = ops.straight_edit(gate, up, "silu", *tables, backend=backend)
    assert torch.equal(found, ops.edit(gate, up, "silu", *tables, backend=backend))
    assert found.is_contiguous()
    assert calls


def test_an_index_outside_is_refused(device, backend):
    (gate, up), tables = arguments(device)
    tables[2][1] = WIDTH
    with pytest.raises(InputError, match="must lie within"):
        ops.straight_edit(gate, up, "silu", *tables, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strided", [True, False])
def test_an_activation_is_edited_where_it_lies(dtype, strided, device, backend):
    (activation, other), tables = arguments(device, dtype)
    if strided:
        activation, other = torch.cat([activation, other], dim=-1).split(WIDTH, dim=-1)
    expected, untouched = ops.edit(activation, None, "identity", *tables, backend=backend), +other
    with torch.no_grad():
        assert ops.straight_edit_(activation, *tables, backend=backend)
    assert torch.equal(activation, expected)
    assert torch.equal(other, untouched)


def test_an_activation_that_somebody_else_must_see_stays_as_it_was(device, backend):
    (activation, _), tables = arguments(device)
    before = activation.clone()
    assert not ops.straight_edit_(activation, *tables, backend=backend)  # gradients are on
    with torch.no_grad():
        assert not ops.straight_edit_(torch._neg_view(activation), *tables, backend=backend)
        assert not ops.straight_edit_(activation, *tables, backend="reference")
        tables[3] = tables[3][:2]
        assert not ops.straight_edit_(activation, *tables, backend=backend)
    assert torch.equal(activation, before)


def test_writing_over_what_is_still_computed_from_is_refused(device, backend):
    (gate, up), tables = arguments(device)
    for other, activation in ((up, "identity"), (None, "silu")):
        with pytest.raises(InputError, match="writes over gate only where"):
            native.library.edit(
                gate, other, gate, native.ACTIVATIONS[activation], *tables, 1
            )  # fmt: skip
