"""Gradients of the ops, and the straight way from a call to its kernel.

`torch.library.register_autograd` refuses ops that write to an argument, so the Autograd kernels
are registered by hand. Backward recomputes the product in the reference's own eager ops: the
gradients are those of the unpatched module, bit for bit. Statistics get none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lapefast.errors import InputError
from lapefast.ops import declarations
from lapefast.ops.backends import reference

__all__: list[str] = []

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_KERNEL_KEYS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def _product(gate: Tensor, up: Tensor | None, activation: str, *statistics: Any) -> Tensor:
    return reference.product(gate, up, activation)


def _edited_product(gate: Tensor, up: Tensor | None, activation: str, *edits: Any) -> Tensor:
    return reference.edited_product(gate, up, activation, *edits[:-1])


class _Recomputed(torch.autograd.Function):
    """Runs an op below autograd; its backward differentiates `recompute(*arguments)`."""

    @staticmethod
    def forward(ctx, run, recompute, backend, gate, up, activation, *rest):
        # The tables of an edit may change in place before backward; statistics change by design
        # and play no part in the gradient.
        kept = [
            argument.clone() if recompute is _edited_product and torch.is_tensor(argument) else None
            for argument in rest
        ]
        ctx.save_for_backward(gate, up, *kept)
        ctx.recompute, ctx.activation = recompute, activation
        return run(gate, up, activation, *rest, backend=backend)

    @staticmethod
    def backward(ctx, gradient):
        gate, up, *kept = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [
                # A view keeps the graph, which a second derivative needs.
                tensor.view_as(tensor) if twice else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip((gate, up), ctx.needs_input_grad[3:5], strict=True)
                if tensor is not None
            ]
            product = ctx.recompute(
                inputs[0], inputs[1] if up is not None else None, ctx.activation, *kept
            )
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            found = iter(torch.autograd.grad(product, wanted, gradient, create_graph=twice))
        gradients = [
            next(found) if tensor is not None and tensor.requires_grad and needed else None
            for tensor, needed in zip((gate, up), ctx.needs_input_grad[3:5], strict=True)
        ]
        return None, None, None, *gradients, None, *(None for _ in kept)


def _refuse_tangents(op: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if torch.is_tensor(argument) and forward_ad.unpack_dual(argument).tangent is not None:
            raise InputError(
                f"{op._schema.name}: an input carries a forward-mode tangent, which would be lost; "
                "use reverse mode."
            )


def _autograd_kernel(
    op: torch._ops.OpOverload, compute: Callable[..., Any], recompute: Callable[..., Tensor] | None
) -> Callable[..., Any]:
    straight: set[int] = set()
    in_place = op is declarations.profile_

    def run_below(keyset, arguments, options):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _BELOW_AUTOGRAD, *arguments, **options)

    def kernel(keyset, *arguments, **options):
        if forward_ad._current_level >= 0 and op is not declarations.observe:
            _refuse_tangents(op, arguments)
        if torch.is_grad_enabled() and op is not declarations.observe:
            gate, up = arguments[0], arguments[1]
            if gate.requires_grad or (up is not None and up.requires_grad):
                if in_place:
                    raise InputError(
                        "profile_: gate or up requires grad while grad mode is on, and the "
                        "product would be written over a tensor that backward needs; use profile."
                    )
                return _Recomputed.apply(
                    lambda *a, **k: run_below(keyset, a, k),
                    recompute,
                    options.get("backend", "auto"),
                    *arguments,
                )
        # Where nothing stands between autograd and the kernel (no mode, no transform), a second
        # trip through the dispatcher is saved: it costs as much as the rest of a small call.
        if keyset.raw_repr() in straight:
            result = compute(*arguments, **options)
        else:
            if (keyset & _BELOW_AUTOGRAD).highestPriorityTypeId() in _KERNEL_KEYS:
                straight.add(keyset.raw_repr())
            result = run_below(keyset, arguments, options)
        if in_place:
            torch.autograd.graph.increment_version(arguments[0])
        return result

    return kernel


for _op, _compute, _recompute in (
    (declarations.profile, declarations.compute_profile, _product),
    (declarations.profile_, declarations.compute_profile_, None),
    (declarations.edit, declarations.compute_edit, _edited_product),
    (declarations.observe, declarations.compute_observe, None),
):
    declarations.LIBRARY.impl(
        _op._schema.name.split("::")[1],
        _autograd_kernel(_op, _compute, _recompute),
        "Autograd",
        with_keyset=True,
    )


def _without_gradient(keyset, *arguments, **options):
    """Scores carry no gradient."""
    with torch._C._AutoDispatchBelowAutograd():
        return declarations.leave_one_out.redispatch(
            keyset & _BELOW_AUTOGRAD, *arguments, **options
        )


declarations.LIBRARY.impl("leave_one_out", _without_gradient, "Autograd", with_keyset=True)
