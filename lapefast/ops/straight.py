"""The straight way to the native library on a CPU, past PyTorch's dispatcher.

On a few rows, as a decoding step has them, the dispatcher's way through Python takes several times
as long as the kernel; so does a second check of tables that have not changed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lapefast.errors import InputError
from lapefast.ops import declarations
from lapefast.ops.backends import backend_for, cpu, native

__all__ = ["EditTables", "profile"]

# Whether any is on in this thread. Asking the dispatcher for the keys that they all put there takes
# four times as long as these four questions, and the keys are other ones in inference mode.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_tracers = torch._C._is_tracing


def profile(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    threshold: float,
    groups: Tensor | None,
    counts: Tensor | None,
    sums: Tensor | None,
    square_sums: Tensor | None,
    up_abs_sums: Tensor | None,
    flags: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The op `lapefast::profile`; see `declarations.compute_profile`.

    Straight to the native library where that serves and nothing stands in between: no gradient is
    wanted and no mode, transform or tracer watches. What the library refuses goes to the op, whose
    check says it better.
    """
    if (
        not torch.compiler.is_compiling()
        and type(gate) is Tensor
        and (up is None or type(up) is Tensor)
        and gate.is_cpu
        and backend_for(backend, "cpu") is cpu
        and _nothing_between()
        and not (torch.is_grad_enabled() and _wants_gradient(gate, up))
        and not _any_negative(gate, up, groups, counts, sums, square_sums, up_abs_sums, flags)
    ):
        try:
            return cpu.profile(
                None, gate, up, activation, threshold,
                groups, counts, sums, square_sums, up_abs_sums, flags,
            )  # fmt: skip
        except (InputError, KeyError, RuntimeError):
            pass
    return declarations.profile(
        gate, up, activation, threshold,
        groups, counts, sums, square_sums, up_abs_sums, flags, backend=backend,
    )  # fmt: skip


class EditTables:
    """The edit tables of one site, for as many calls as there are tokens.

    Args:
        offsets, neurons, scale, shift, flags: as `lapefast.ops.edit` takes them. On a CPU the
            library follows a copy that it makes here, so they must not change afterwards.
        width: neurons of the site.
        backend: who computes; a backend's own name, not "auto".

    Raises:
        InputError: where the CPU's library is to compute by tables that it can't follow.
    """

    def __init__(
        self,
        offsets: Tensor,
        neurons: Tensor,
        scale: Tensor,
        shift: Tensor,
        flags: Tensor,
        width: int,
        backend: str,
    ) -> None:
        self.tensors = (offsets, neurons, scale, shift, flags)
        self.width, self.backend = width, backend
        self._kept = None
        if backend == "cpu":
            self._kept = native.library.keep_tables(
                offsets, neurons, scale.resolve_neg(), shift.resolve_neg(), width
            )

    def __reduce__(self) -> tuple:
        return EditTables, (*self.tensors, self.width, self.backend)

    def edit(self, gate: Tensor, up: Tensor | None, activation: str, sets: Tensor | None) -> Tensor:
        """`lapefast.ops.edit`, straight to the native library where nothing stands in between.

        That is where no gradient is wanted and no mode, transform or tracer watches. The library
        checks types, sizes and indices itself; what it refuses goes to the op, whose check says it
        better.
        """
        if torch.compiler.is_compiling():
            return self._op(gate, up, activation, sets)
        # Written out in one piece: here every name that is passed on costs as much as a row.
        # Shapes, strides and types are left to the library.
        if (
            self._kept is not None
            and type(gate) is Tensor
            and (up is None or (type(up) is Tensor and not up.is_neg()))
            and not gate.is_neg()
            and _nothing_between()
            and not (torch.is_grad_enabled() and _wants_gradient(gate, up))
        ):
            product = torch.empty_like(gate)
            threads = 1 if gate.numel() < native.FEW_TO_EDIT else torch.get_num_threads()
            try:
                number = native.ACTIVATIONS[activation]
                native.library.edit_kept(self._kept, gate, up, product, number, sets, threads)
                return product
            except (InputError, RuntimeError, KeyError):
                pass
        return self._op(gate, up, activation, sets)

    def edit_(self, activation: Tensor, sets: Tensor | None) -> bool:
        """Edit an activation where it lies, or say that this can't be done and do nothing.

        Nothing else may read the activation as it was.
        """
        if (
            self._kept is not None
            and type(activation) is Tensor
            and not torch.is_grad_enabled()
            and not activation.is_neg()
            and _nothing_between()
        ):
            threads = 1 if activation.numel() < native.FEW_TO_EDIT else torch.get_num_threads()
            try:
                native.library.edit_kept_in_place(self._kept, activation, sets, threads)
                return True
            except (InputError, RuntimeError):
                pass
        return False

    def _op(self, gate: Tensor, up: Tensor | None, activation: str, sets: Tensor | None) -> Tensor:
        return declarations.edit(gate, up, activation, sets, *self.tensors, backend=self.backend)


def _nothing_between() -> bool:
    """Whether no mode, transform or tracer of this thread watches."""
    # make_fx before dispatch shows among the function modes only.
    watched = _dispatch_modes() or _function_modes() or _transforms() or _tracers()
    return not watched and forward_ad._current_level < 0


def _any_negative(*tensors: Tensor | None) -> bool:
    """Whether any is a view of memory that holds the numbers negated: the dispatcher sees to it."""
    for tensor in tensors:  # half the time of any()
        if tensor is not None and tensor.is_neg():
            return True
    return False


def _wants_gradient(gate: Tensor, up: Tensor | None) -> bool:
    return gate.requires_grad or (up is not None and up.requires_grad)
