"""Compiles the kernels for a named target, on a machine without a GPU.

A real launch compiles the same sources when it is first made. This is for looking at the machine
code: registers, spills, the width of loads and stores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from lapefast.triton_kernels.activations import INTERPRETED
from lapefast.triton_kernels.edit import edit_kernel
from lapefast.triton_kernels.profile import profile_kernel
from lapefast.triton_kernels.rows import VECTOR, launch_options, tile_of

__all__ = ["TARGETS", "compile_for", "specialisations"]

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100)}
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_STATISTICS = {
    "counts": "*i64", "sums": "*fp64", "square_sums": "*fp64", "up_abs_sums": "*fp64"
}  # fmt: skip
_TABLES = {"offsets": "*i32", "neurons": "*i32", "scale": "*fp32", "shift": "*fp32"}


def specialisations() -> Iterator[dict[str, Any]]:
    """Keyword arguments of `compile_for` for what models use: counts alone, and all statistics."""
    for dtype, gated in itertools.product(_NAMES, (True, False)):
        for activation in ("identity", "silu") if gated else ("identity", "relu", "gelu_new"):
            common = {"dtype": dtype, "activation": activation, "gated": gated}
            for statistics in (("counts",), tuple(_STATISTICS)[: 4 if gated else 3]):
                yield {"op": "profile", "statistics": statistics} | common
            yield {"op": "edit"} | common
    for dtype in _NAMES:
        common = {"dtype": dtype, "activation": "identity", "gated": False}
        yield {"op": "observe", "statistics": ("counts",)} | common


def compile_for(
    target: GPUTarget,
    op: str,
    dtype: torch.dtype,
    activation: str,
    *,
    gated: bool = True,
    statistics: tuple[str, ...] = ("counts",),
    indexed: bool = True,
    aligned: bool = True,
) -> CompiledKernel:
    """The kernel as a launch would compile it; its `asm` holds "ptx" and "cubin".

    `op` is "profile", "observe" or "edit". `indexed`: whether rows have groups or sets. `aligned`:
    whether addresses, width and strides are multiples of 16 bytes; if not, none of them is.
    Raises RuntimeError under TRITON_INTERPRET=1.
    """
    if INTERPRETED.value:
        raise RuntimeError("kernels are interpreted here: unset TRITON_INTERPRET to compile them.")
    matrix = f"*{_NAMES[dtype]}"
    types = {"gate": matrix, "flags": "*i64"}
    if gated:
        types["up"] = matrix
    if op != "observe":
        types["product"] = matrix
    if indexed:
        types["sets" if op == "edit" else "groups"] = "*i32"
    if op == "edit":
        kernel, given = edit_kernel, _TABLES
    else:
        kernel, given = profile_kernel, {name: _STATISTICS[name] for name in statistics}
        types["threshold"] = "fp32"
    types |= given
    constants = {
        "ACTIVATION": activation,
        "STEP": VECTOR // dtype.itemsize if aligned else 1,
        "TILE": tile_of(dtype, target.warp_size),
    }
    pointers = {"groups", "sets", "up", "product", *_STATISTICS}
    signature = {}
    for name in kernel.arg_names:
        if name in types:
            signature[name] = types[name]
        elif name in pointers:
            constants[name] = None
            signature[name] = "constexpr"
        else:
            signature[name] = "constexpr" if name in constants else "i32"
    # Statistics and tables come from the allocator, which aligns them; the rest may be views.
    hints = {
        (kernel.arg_names.index(name),): [["tt.divisibility", VECTOR]]
        for name, kind in types.items()
        if kind.startswith("*") and (aligned or name not in ("gate", "up", "product"))
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, hints),
        target=target,
        options=launch_options(target.backend),
    )
