"""Every op: schema, check, fake, and the kernel that asks a backend.

Shapes. `gate`, `up`: [..., width], float32, float16 or bfloat16; the leading dimensions are rows.
`groups`, `sets`: int32, one per row, or one element that holds for every row; None means group or
set 0; -1 counts nowhere, or edits nothing. `counts`: int64 [groups, width]; `sums`,
`square_sums`, `up_abs_sums`: float64 [groups, width]. `flags`: int64 [2]: non-finite activations
in counted rows, and out-of-range indices. `offsets`: int32 [sets + 1] into `neurons` (int32,
ascending within a set), `scale` and `shift` (float32), all [capacity]; entries that no set covers
are unused.

Statistics are added to tensors that the caller owns. Tensors that an op reads and writes must not
overlap. On the CPU an out-of-range index raises InputError before anything is written; elsewhere
it is skipped and counted in `flags`, for the reader of the statistics to raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lapefast.errors import InputError
from lapefast.ops.backends import backend_for, cpu
from lapefast.ops.checks import (
    check_edit,
    check_leave_one_out,
    check_statistics,
    check_writable,
)

__all__ = ["LIBRARY", "edit", "leave_one_out", "observe", "profile", "profile_"]

LIBRARY = torch.library.Library("lapefast", "DEF")

_GATED = "{gate} gate, Tensor? up, str activation, "
_STATISTICS = (
    "float threshold, Tensor? groups, Tensor(a!)? counts, Tensor(b!)? sums, "
    "Tensor(c!)? square_sums, {up_abs_sums}Tensor(e!) flags, *, str backend='auto') -> "
)
_UP_ABS_SUMS = "Tensor(d!)? up_abs_sums, "

LIBRARY.define(
    "profile("
    + _GATED.format(gate="Tensor")
    + _STATISTICS.format(up_abs_sums=_UP_ABS_SUMS)
    + "Tensor"
)
LIBRARY.define(
    "profile_("
    + _GATED.format(gate="Tensor(f!)")
    + _STATISTICS.format(up_abs_sums=_UP_ABS_SUMS)
    + "()"
)
LIBRARY.define("observe(Tensor gate, str activation, " + _STATISTICS.format(up_abs_sums="") + "()")
LIBRARY.define(
    "edit("
    + _GATED.format(gate="Tensor")
    + "Tensor? sets, Tensor offsets, Tensor neurons, Tensor scale, Tensor shift, "
    "Tensor(a!) flags, *, str backend='auto') -> Tensor"
)

LIBRARY.define(
    "leave_one_out(Tensor query, Tensor key, Tensor logits, float factor, float softcap=0.0, *, "
    "str backend='auto') -> Tensor"
)

profile = torch.ops.lapefast.profile.default
profile_ = torch.ops.lapefast.profile_.default
observe = torch.ops.lapefast.observe.default
edit = torch.ops.lapefast.edit.default
leave_one_out = torch.ops.lapefast.leave_one_out.default


def compute_profile(
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
    """The product as the model computes it, contiguous; in the same pass the statistics."""
    chosen = backend_for(backend, "cpu" if gate.is_cpu else gate.device.type)
    if chosen is cpu:
        # The library believes nothing that it is given, and a check before its own would be half of
        # a small call. Only what it refuses is checked here, where the message is better.
        try:
            return cpu.profile(
                None, gate, up, activation, threshold,
                groups, counts, sums, square_sums, up_abs_sums, flags,
            )  # fmt: skip
        except (InputError, KeyError, RuntimeError):
            pass
    size = check_statistics(
        "profile", gate, up, activation, threshold,
        groups, counts, sums, square_sums, up_abs_sums, flags,
    )  # fmt: skip
    return chosen.profile(
        size, gate, up, activation, threshold,
        groups, counts, sums, square_sums, up_abs_sums, flags,
    )  # fmt: skip


def compute_profile_(
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
) -> None:
    """`profile` with the product written over `gate`."""
    size = check_statistics(
        "profile_", gate, up, activation, threshold,
        groups, counts, sums, square_sums, up_abs_sums, flags,
    )  # fmt: skip
    check_writable(gate)
    backend_for(backend, "cpu" if gate.is_cpu else gate.device.type).profile_(
        size, gate, up, activation, threshold,
        groups, counts, sums, square_sums, up_abs_sums, flags,
    )  # fmt: skip


def compute_observe(
    gate: Tensor,
    activation: str,
    threshold: float,
    groups: Tensor | None,
    counts: Tensor | None,
    sums: Tensor | None,
    square_sums: Tensor | None,
    flags: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """The statistics alone; `square_sums` are of the activation, as there is no product."""
    statistics = (threshold, groups, counts, sums, square_sums, None, flags)
    size = check_statistics("observe", gate, None, activation, *statistics)
    backend_for(backend, gate.device.type).observe(size, gate, activation, *statistics)


def compute_edit(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    sets: Tensor | None,
    offsets: Tensor,
    neurons: Tensor,
    scale: Tensor,
    shift: Tensor,
    flags: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The product with the chosen neurons' activations replaced by `scale * a + shift`.

    In float32 from the rounded activation: multiply, add, round once. A scale of 0 overwrites.
    """
    edits = (sets, offsets, neurons, scale, shift, flags)
    size = check_edit(gate, up, activation, *edits)
    return backend_for(backend, gate.device.type).edit(size, gate, up, activation, *edits)


def compute_leave_one_out(
    query: Tensor,
    key: Tensor,
    logits: Tensor,
    factor: float,
    softcap: float = 0.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """How much each head's attention map changes without one dimension of its queries and keys.

    With P = softmax(logits) over the last dimension and P_c = softmax(logits - factor * q_c k_c^T):
    sum over the map of (P_c - P)^2, float64 [heads, dimensions] (arXiv 2402.18815).

    Args:
        query: float32 [heads, length, dimensions].
        key: float32 [key heads, columns, dimensions]; each serves heads / key heads heads.
        logits: float32 [heads, length, columns], minus infinity where masked; a row that is masked
            as a whole changes nothing.
        factor: of the product that is taken away.
        softcap: logits are soft * tanh(logits / soft) before the softmax; 0 for none.
    """
    check_leave_one_out(query, key, logits, softcap)
    return backend_for(backend, query.device.type).leave_one_out(
        query, key, logits, factor, softcap
    )


@torch.library.register_fake("lapefast::leave_one_out", lib=LIBRARY)
def _(query, key, logits, factor, softcap=0.0, backend="auto"):
    check_leave_one_out(query, key, logits, softcap)
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float64)


@torch.library.register_fake("lapefast::profile", lib=LIBRARY)
def _(gate, up, activation, *statistics, backend="auto"):
    check_statistics("profile", gate, up, activation, *statistics)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("lapefast::profile_", lib=LIBRARY)
def _(gate, up, activation, *statistics, backend="auto"):
    check_statistics("profile_", gate, up, activation, *statistics)
    check_writable(gate)


@torch.library.register_fake("lapefast::observe", lib=LIBRARY)
def _(gate, activation, threshold, groups, counts, sums, square_sums, flags, backend="auto"):
    statistics = (threshold, groups, counts, sums, square_sums, None, flags)
    check_statistics("observe", gate, None, activation, *statistics)


@torch.library.register_fake("lapefast::edit", lib=LIBRARY)
def _(gate, up, activation, *edits, backend="auto"):
    check_edit(gate, up, activation, *edits)
    return gate.new_empty(gate.shape)


for _op, _compute in (
    ("profile", compute_profile),
    ("profile_", compute_profile_),
    ("observe", compute_observe),
    ("edit", compute_edit),
    ("leave_one_out", compute_leave_one_out),
):
    LIBRARY.impl(_op, _compute, "CompositeExplicitAutograd")
