"""The straight way gives what the op gives, and leaves to the op what only that can do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from op_cases import (
    DTYPES,
    LAYOUTS,
    STATISTICS,
    Tally,
    edits_for,
    row_groups,
    run_profile,
    values,
)
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lapefast import ops
from lapefast.errors import InputError
from lapefast.ops import EditTables, declarations, straight
from lapefast.ops.backends import native

WIDTH = 37
# What torch refuses to describe is its own error.
REFUSED = (InputError, RuntimeError)


@pytest.fixture(autouse=True)
def _native(backend):
    if backend != "cpu":
        pytest.skip("only the CPU's native library has a straight way: --backend cpu runs this")


@pytest.fixture
def calls(monkeypatch):
    """How often the op was taken instead."""
    seen = []

    def counted(op):
        def run(*arguments, **options):
            seen.append(arguments)
            return op(*arguments, **options)

        return run

    for name in ("edit", "profile"):
        monkeypatch.setattr(straight.declarations, name, counted(getattr(declarations, name)))
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


def straight_edit(gate, up, activation, sets, *tables, backend):
    return EditTables(*tables, WIDTH, backend).edit(gate, up, activation, sets)


def straight_edit_(activation, sets, *tables, backend):
    return EditTables(*tables, WIDTH, backend).edit_(activation, sets)


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
    found = straight_edit(gate, up, "silu", *tables, backend=backend)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert not calls


def test_gradients_go_through_the_op(device, backend, calls):
    (gate, up), tables = arguments(device)
    gate.requires_grad_()
    straight_edit(gate, up, "silu", *tables, backend=backend).sum().backward()
    assert len(calls) == 1
    assert bool((gate.grad != 0).any())
    with torch.no_grad():
        straight_edit(gate, up, "silu", *tables, backend=backend)
    assert len(calls) == 1


def test_a_mode_sees_the_op(device, backend, calls):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    (gate, up), tables = arguments(device)
    with Names():
        straight_edit(gate, up, "silu", *tables, backend=backend)
    assert "lapefast.edit.default" in names


class PassesOn(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _in_mode(call, gate):
    with PassesOn():
        call()


def _in_forward_mode(call, gate):
    with torch.autograd.forward_ad.dual_level():
        call()


def _within(transform):
    def run(call, gate):
        def called(x):
            call()
            return x.sum()

        transform(called)(gate)

    return run


WATCHERS = {
    "a function mode": _in_mode,
    "forward-mode derivatives": _in_forward_mode,
    "vmap": _within(torch.func.vmap),
    "grad": _within(torch.func.grad),
    "jit.trace": lambda call, gate: torch.jit.trace(
        lambda x: call() or x + 0, gate, check_trace=False
    ),
    "make_fx": _within(lambda f: lambda x: make_fx(f)(x)),
    "make_fx before dispatch": _within(lambda f: lambda x: make_fx(f, pre_dispatch=True)(x)),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_whoever_watches_sees_the_op(watcher, device, backend, calls):
    """Also where it did not make the tensors."""
    (gate, up), (sets, *tables) = arguments(device)
    kept, taken, tally = EditTables(*tables, WIDTH, backend), [], Tally(1, WIDTH)

    def call():
        with torch.no_grad():
            run_profile(gate, up, "silu", None, tally, backend=backend)
            kept.edit(gate, up, "silu", sets)
            taken.append(kept.edit_(gate, sets))

    WATCHERS[watcher](call, torch.ones(3))
    assert taken == [False]
    assert len(calls) == 2
    call()
    assert taken == [False, True]
    assert len(calls) == 2


def test_inference_mode_watches_nothing(device, backend, calls):
    (gate, up), (sets, *tables) = arguments(device)
    expected = ops.edit(gate, up, "silu", sets, *tables, backend=backend)
    kept = EditTables(*tables, WIDTH, backend)
    with torch.inference_mode():
        assert torch.equal(kept.edit(gate, up, "silu", sets), expected)
        run_profile(gate, up, "silu", None, Tally(1, WIDTH), backend=backend)
        assert kept.edit_(gate, sets)
    assert not calls


def test_a_subclass_and_a_tracer_get_the_op(device, backend, calls):
    (gate, up), tables = arguments(device)
    with torch.no_grad():
        straight_edit(torch.nn.Parameter(gate), up, "silu", *tables, backend=backend)
    assert len(calls) == 1
    traced = torch.jit.trace(
        lambda gate: straight_edit(gate, up, "silu", *tables, backend=backend) + 0,
        gate, check_trace=False,
    )  # fmt: skip
    other = gate * 2
    assert torch.equal(traced(other), ops.edit(other, up, "silu", *tables, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, u, s: (g, u[:1], s), "edit: up must be"),
        (lambda g, u, s: (g.double(), u.double(), s), "edit: gate must be"),
        (lambda g, u, s: (g, u, s[:4]), "edit: sets must be"),
        (lambda g, u, s: (g, u, s + 1), "edit: sets holds 2, but there are 2 sets"),
        (lambda g, u, s: (g, u, s - 1), "edit: sets holds -2, but there are 2 sets"),
    ],
)
def test_what_is_wrong_is_said_by_the_op(change, message, device, backend):
    (gate, up), (sets, *tables) = arguments(device)
    gate, up, sets = change(gate, up, sets)
    with pytest.raises(InputError, match=message):
        straight_edit(gate, up, "silu", sets, *tables, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.tensor([0, 3, 5])}, "offsets is of another type"),
        ({0: torch.zeros(0, dtype=torch.int32)}, "offsets must hold one more than there are sets"),
        ({0: torch.tensor([0, 3, 6], dtype=torch.int32)}, "must ascend within \\[0, 5\\]"),
        ({0: torch.tensor([0, -1, 5], dtype=torch.int32)}, "must ascend within \\[0, 5\\]"),
        ({1: torch.tensor([0, 8, WIDTH, 1, 2], dtype=torch.int32)}, "must lie within \\[0, 37\\)"),
        ({1: torch.tensor([0, 8, 36, -1, 2], dtype=torch.int32)}, "must lie within \\[0, 37\\)"),
        ({1: torch.tensor([0, 8, 36, 2, 1], dtype=torch.int32)}, "ascend without repeats"),
        ({2: torch.zeros(2)}, "scale is of another size"),
        ({3: torch.zeros(10)[::2]}, "shift must be contiguous"),
    ],
)
def test_tables_that_do_not_fit_are_refused_at_once(change, message, device, backend):
    """Of every set, also those that no row has."""
    _, (_, *tables) = arguments(device)
    tables = [change.get(at, table) for at, table in enumerate(tables)]
    with pytest.raises(InputError, match=message):
        EditTables(*tables, WIDTH, backend)


def test_the_library_keeps_tables_of_its_own(device, backend):
    (gate, up), (sets, *tables) = arguments(device)
    expected = ops.edit(gate, up, "silu", sets, *tables, backend=backend)
    kept = EditTables(*tables, WIDTH, backend)
    for table in tables:
        table.fill_(1 << 20)
    assert torch.equal(kept.edit(gate, up, "silu", sets), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_copies_of_tables_edit_as_they_do(copied, device, backend, calls):
    (gate, up), (sets, *tables) = arguments(device)
    kept = EditTables(*tables, WIDTH, backend)
    expected = kept.edit(gate, up, "silu", sets)
    assert torch.equal(copied(kept).edit(gate, up, "silu", sets), expected)
    assert not calls


def test_negated_views_of_tables_are_resolved(device, backend):
    (gate, up), (sets, *tables) = arguments(device)
    expected = EditTables(*tables, WIDTH, backend).edit(gate, up, "silu", sets)
    negated = [torch._neg_view(-table) for table in tables[2:4]]
    found = EditTables(*tables[:2], *negated, tables[4], WIDTH, backend)
    assert torch.equal(found.edit(gate, up, "silu", sets), expected)


def without_memory(shape, dtype):
    """Tensors that have none, with an offset."""
    (length, *rest) = shape
    zeros = torch._efficientzerotensor(length + 3, *rest, dtype=dtype)[3:]
    with FakeTensorMode():
        fake = torch.zeros(length + 3, *rest, dtype=dtype)[3:]
    return zeros, fake


def test_tensors_without_memory_are_refused_whatever_their_offset(device, backend):
    (gate, _), (sets, *tables) = arguments(device)
    kept = native.library.keep_tables(*tables[:4], WIDTH)
    for at, table in enumerate(tables[:4]):
        for bad in without_memory(table.shape, table.dtype):
            given = [bad if at == other else table for other, table in enumerate(tables[:4])]
            with pytest.raises(REFUSED):
                native.library.keep_tables(*given, WIDTH)
    for bad in without_memory(gate.shape, gate.dtype):
        with pytest.raises(REFUSED):
            native.library.edit_kept_in_place(kept, bad, sets, 1)
        with pytest.raises(REFUSED):
            native.library.edit_kept(kept, gate, bad, torch.empty_like(gate), 1, sets, 1)
    for bad in without_memory(sets.shape, sets.dtype):
        with pytest.raises(REFUSED):
            native.library.edit_kept_in_place(kept, gate, bad, 1)


@pytest.mark.parametrize("tables", [None, 1, "tables", object(), torch.zeros(2)])
def test_what_is_no_kept_tables_is_refused(tables, device, backend):
    with pytest.raises(InputError, match="tables must be what keep_tables returned"):
        native.library.edit_kept_in_place(tables, torch.ones(1, WIDTH), None, 1)


@pytest.mark.parametrize(
    ("change", "width", "message"),
    [({}, -1, "width must not be negative"), ({0: "meta"}, WIDTH, None)],
)
def test_a_width_and_a_place_that_can_not_be_are_refused(change, width, message, device, backend):
    _, (_, *tables) = arguments(device)
    tables = [table.to(change.get(at, device)) for at, table in enumerate(tables)]
    with pytest.raises(REFUSED, match=message):
        EditTables(*tables, width, backend)


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_only_rows_of_the_width_that_was_checked_are_edited(width, device, backend, calls):
    (gate, up), (sets, *tables) = arguments(device)
    tables[1].clamp_(max=20)  # fits all three widths
    kept = native.library.keep_tables(*tables[:4], WIDTH)
    gate = torch.ones(15, width)
    for call in (
        lambda: native.library.edit_kept(kept, gate, None, torch.empty_like(gate), 0, sets, 1),
        lambda: native.library.edit_kept_in_place(kept, gate, sets, 1),
    ):
        with pytest.raises(InputError, match="must be as wide as its tables say"):
            call()
    assert bool((gate == 1).all())


def test_a_negative_view_goes_to_the_op(device, backend, calls):
    (gate, up), tables = arguments(device)
    for pair in ((torch._neg_view(gate), up), (gate, torch._neg_view(up))):
        expected = ops.edit(*(one.resolve_neg() for one in pair), "silu", *tables, backend=backend)
        found = straight_edit(*pair, "silu", *tables, backend=backend)
        assert torch.equal(found, expected)


def test_rows_without_one_stride_go_to_the_op(device, backend, calls):
    (gate, up), tables = arguments(device)
    gate, up = (one.transpose(0, 1).contiguous().transpose(0, 1) for one in (gate, up))
    found = straight_edit(gate, up, "silu", *tables, backend=backend)
    assert torch.equal(found, ops.edit(gate, up, "silu", *tables, backend=backend))
    assert found.is_contiguous()
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strided", [True, False])
def test_an_activation_is_edited_where_it_lies(dtype, strided, device, backend):
    (activation, other), tables = arguments(device, dtype)
    if strided:
        activation, other = torch.cat([activation, other], dim=-1).split(WIDTH, dim=-1)
    expected, untouched = ops.edit(activation, None, "identity", *tables, backend=backend), +other
    with torch.no_grad():
        assert straight_edit_(activation, *tables, backend=backend)
    assert torch.equal(activation, expected)
    assert torch.equal(other, untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_neighbours_are_edited_where_they_lie(dtype, device, backend):
    activation = values(5, 200, dtype=dtype).to(device)
    sets, *tables = (
        table.to(device)
        for table in (torch.tensor([2, -1, 0, 2, 3], dtype=torch.int32), *edits_for(200).tables())
    )
    flags = torch.zeros(2, dtype=torch.int64, device=device)
    expected = ops.edit(activation, None, "identity", sets, *tables, flags, backend="reference")
    with torch.no_grad():
        assert EditTables(*tables, flags, 200, backend).edit_(activation, sets)
    assert torch.equal(activation, expected)


def test_an_activation_that_somebody_else_must_see_stays_as_it_was(device, backend):
    (activation, _), tables = arguments(device)
    before = activation.clone()
    assert not straight_edit_(activation, *tables, backend=backend)  # gradients are on
    with torch.no_grad():
        assert not straight_edit_(torch._neg_view(activation), *tables, backend=backend)
        assert not straight_edit_(activation, *tables, backend="reference")
        assert not straight_edit_(torch.nn.Parameter(activation), *tables, backend=backend)
        assert not straight_edit_(activation[:1].expand(5, 3, WIDTH), *tables, backend=backend)
        assert not straight_edit_(activation, tables[0][:2], *tables[1:], backend=backend)
        assert not straight_edit_(activation.double(), *tables, backend=backend)
    assert torch.equal(activation, before)


def test_writing_over_what_is_still_computed_from_is_refused(device, backend):
    (gate, up), (sets, *tables) = arguments(device)
    kept = native.library.keep_tables(*tables[:4], WIDTH)
    for other, activation in ((up, "identity"), (None, "silu")):
        number = native.ACTIVATIONS[activation]
        with pytest.raises(InputError, match="writes over gate only where"):
            native.library.edit(gate, other, gate, number, sets, *tables, 1)
        with pytest.raises(InputError, match="writes over gate only where"):
            native.library.edit_kept(kept, gate, other, gate, number, sets, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_profile_equals_the_op(layout, dtype, backend, calls):
    gate, up = LAYOUTS[layout](dtype)
    width = gate.shape[-1]
    groups = row_groups(gate.shape[:-1].numel(), 2)
    found, expected = Tally(2, width), Tally(2, width)
    product = run_profile(gate, up, "silu", groups, found, backend=backend)
    assert not calls
    op = torch.ops.lapefast.profile
    made = op(gate, up, "silu", 0.0, groups, *expected.arguments(), backend=backend)
    assert torch.equal(product, made)
    assert product.is_contiguous()
    for name in (*STATISTICS, "flags"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_profile_with_gradients_or_other_tensors_goes_through_the_op(device, backend, calls):
    (gate, up), _ = arguments(device)
    leaf = gate.clone().requires_grad_()
    for one, other in ((leaf, up), (gate, up.clone().requires_grad_())):
        run_profile(one, other, "silu", None, Tally(1, WIDTH), backend=backend).sum().backward()
    assert bool((leaf.grad != 0).any())
    assert len(calls) == 2
    with torch.no_grad():
        run_profile(leaf, up, "silu", None, Tally(1, WIDTH), backend=backend)
        assert len(calls) == 2
        run_profile(torch.nn.Parameter(gate), up, "silu", None, Tally(1, WIDTH), backend=backend)
        assert len(calls) == 3
        run_profile(gate, torch.nn.Parameter(up), "silu", None, Tally(1, WIDTH), backend=backend)
    assert len(calls) == 4
    run_profile(gate, up, "silu", None, Tally(1, WIDTH), backend="reference")
    assert len(calls) == 5


def test_negative_views_are_resolved(device, backend, calls):
    (gate, up), _ = arguments(device)
    expected, tally = Tally(1, WIDTH), Tally(1, WIDTH)
    product = run_profile(-gate, -up, "silu", None, expected, backend=backend)
    assert not calls
    views = (torch._neg_view(gate), torch._neg_view(up))
    assert torch.equal(run_profile(*views, "silu", None, tally, backend=backend), product)
    for name in STATISTICS:
        assert torch.equal(getattr(tally, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.ones(2, WIDTH)}, "profile: up must be"),
        ({"counts": torch.zeros(1, WIDTH)}, "profile: counts must be"),
        ({"groups": torch.tensor([3], dtype=torch.int32)}, "profile: groups holds 3"),
        ({"activation": "tanh"}, "profile: activation must be"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_by_the_op(change, message, device, backend):
    (gate, up), _ = arguments(device)
    tally = Tally(1, WIDTH)
    statistics = dict(zip((*STATISTICS, "flags"), tally.arguments(), strict=True))
    given = {"gate": gate, "up": up, "activation": "silu", "threshold": 0.0, "groups": None}
    with pytest.raises(InputError, match=message):
        ops.profile(**(given | statistics | change), backend=backend)
    assert not tally.counts.any()
