"""Gradients are the unpatched module's own, eager and compiled; statistics get none."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, Tally, edits_for, named, run_edit, run_profile, values
from torch import nn

from lapefast import ops
from lapefast.errors import InputError


def leaves(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    return [values(*shape, dtype=dtype, seed=seed).requires_grad_() for seed in range(2)]


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_equal_those_of_eager(activation, dtype, gated):
    weight = values(4, 24, dtype=dtype, seed=5)
    gate, up = leaves(dtype, 4, 24)
    tally = Tally(1, 24)
    tally.up_abs_sums = tally.up_abs_sums if gated else None
    made = run_profile(gate, up if gated else None, activation, None, tally)
    (made * weight).sum().backward()
    eager_gate, eager_up = leaves(dtype, 4, 24)
    eager = ops.ACTIVATIONS[activation](eager_gate)
    eager = eager * eager_up if gated else eager
    (eager * weight).sum().backward()
    assert torch.equal(gate.grad, eager_gate.grad)
    if gated:
        assert torch.equal(up.grad, eager_up.grad)
    assert not tally.sums.requires_grad


@pytest.mark.parametrize("trained", [0, 1])
def test_only_what_requires_grad_gets_one(trained):
    tensors = [values(4, 24, dtype=torch.float32), values(4, 24, dtype=torch.float32, seed=1)]
    tensors[trained].requires_grad_()
    run_profile(*tensors, "silu", None, Tally(1, 24)).sum().backward()
    assert tensors[trained].grad is not None
    assert tensors[1 - trained].grad is None


def test_second_derivatives_are_those_of_eager():
    def second(function):
        gate, up = leaves(torch.float32, 3, 8)
        (first,) = torch.autograd.grad(function(gate, up).sum(), gate, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (gate, up))

    got = second(lambda gate, up: run_profile(gate, up, "silu", None, Tally(1, 8)))
    expected = second(lambda gate, up: nn.functional.silu(gate) * up)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("op", [ops.profile, ops.profile_])
def test_a_forward_mode_tangent_is_refused_and_not_lost(op):
    flags = torch.zeros(2, dtype=torch.int64)
    with torch.autograd.forward_ad.dual_level():
        gate = torch.autograd.forward_ad.make_dual(torch.ones(2, 8), torch.ones(2, 8))
        with pytest.raises(InputError, match="tangent"), torch.no_grad():
            op(gate, None, "silu", 0.0, None, None, None, None, None, flags)


def test_edited_neurons_pass_their_gradient_through_the_scale():
    gate, up = leaves(torch.float32, 5, 8)
    tables = edits_for(8).tables()
    sets = torch.tensor([0, 1, 2, 3, -1], dtype=torch.int32)
    run_edit(gate, up, "relu", sets, tables).sum().backward()
    through = torch.zeros(5, 8)
    through[:] = 1.0
    through[0, [0, 2, 4, 7]] = 0.0
    offsets, _, scale, _ = tables
    through[2] = scale[offsets[2] : offsets[3]]
    through[3, 4] = 0.0
    assert torch.equal(gate.grad, through * up.detach() * (gate.detach() > 0))


def test_an_edit_that_changes_before_backward_differentiates_what_was_computed():
    gate = values(2, 4, dtype=torch.float32).requires_grad_()
    offsets, neurons, scale, shift = edits_for(4).tables()
    sets = torch.tensor([2], dtype=torch.int32)
    made = run_edit(gate, None, "identity", sets, (offsets, neurons, scale, shift))
    computed = scale[offsets[2] : offsets[3]].clone()
    scale.zero_()
    made.sum().backward()
    assert torch.equal(gate.grad, computed.expand(2, 4))


def test_writing_over_gate_is_refused_where_a_gradient_is_wanted():
    gate, up = leaves(torch.float32, 2, 8)
    tally = Tally(1, 8)
    arguments = ("silu", 0.0, None, *tally.arguments())
    for one, other in ((gate * 1, up.detach()), (gate.detach(), up)):
        with pytest.raises(InputError, match="requires grad while grad mode is on"):
            ops.profile_(one, other, *arguments)
    with torch.no_grad():
        ops.profile_(gate * 1, up, *arguments)
    assert tally.counts.sum() == (gate > 0).sum()


def test_writing_over_a_tensor_that_backward_needs_is_noticed():
    gate, weight = torch.ones(2, 8), torch.ones(2, 8, requires_grad=True)
    kept = gate * weight  # saves gate
    tally = Tally(1, 8, ("counts",))
    ops.profile_(gate, None, "silu", 0.0, None, *tally.arguments())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


class Block(nn.Module):
    """A gated FFN whose product comes from the ops."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = nn.Linear(16, 48)
        self.down = nn.Linear(24, 16)
        self.tally = Tally(2, 24)
        self.tables = edits_for(24).tables()

    def forward(self, hidden: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        gate, up = self.fused(hidden).chunk(2, dim=-1)
        product = run_profile(gate, up, "relu", groups, self.tally)
        edited = run_edit(gate, up, "relu", groups, self.tables)
        ops.observe(up, "identity", 0.0, groups, *self.tally.observed())
        return self.down(product + edited)


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_graph_compiles_and_gives_the_eager_results(training):
    torch._dynamo.reset()
    hidden = values(6, 16, dtype=torch.float32)
    groups = torch.tensor([0, 1, -1, 1, 1, 0], dtype=torch.int32)
    results = []
    for compiled in (False, True):
        block = Block()
        run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
        with torch.set_grad_enabled(training):
            output = run(hidden, groups)
        if training:
            output.square().sum().backward()
        gradients = [weight.grad for weight in block.parameters()]
        results.append((output.detach(), block.tally.arguments(), gradients))
    (eager, tally, gradients), (compiled, compiled_tally, compiled_gradients) = results
    assert torch.equal(eager, compiled)
    assert all(torch.equal(a, b) for a, b in zip(tally, compiled_tally, strict=True))
    if training:
        assert all(torch.equal(a, b) for a, b in zip(gradients, compiled_gradients, strict=True))


def test_the_default_compiler_writes_over_gate_and_into_statistics_without_a_copy():
    torch._dynamo.reset()
    tally, expected = Tally(1, 24, ("counts",)), Tally(1, 24, ("counts",))
    address = tally.counts.data_ptr()

    @torch.compile(fullgraph=True)
    def step(hidden):
        gate = hidden + 1
        ops.profile_(gate, None, "relu", 0.0, None, *tally.arguments())
        return gate * 2

    hidden = values(6, 24, dtype=torch.float32)
    with torch.no_grad():
        got = step(hidden)
        again = step(hidden)
    activated = run_profile(hidden + 1, None, "relu", None, expected)
    assert torch.equal(got, activated * 2)
    assert torch.equal(got, again)
    assert torch.equal(tally.counts, expected.counts * 2)
    assert tally.counts.data_ptr() == address
