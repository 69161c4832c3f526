"""How the rows of a tensor lie in memory, as kernels walk them: one stride from row to row."""

from __future__ import annotations

from torch import Tensor

__all__ = ["collapsible", "in_rows"]


def collapsible(tensor: Tensor) -> int | None:
    """The row stride of `tensor` seen as [rows, width]; None if it has no single one."""
    shape, stride = tensor.shape, tensor.stride()
    if tensor.is_contiguous():
        return shape[-1]
    if stride[-1] != 1 and shape[-1] > 1:
        return None
    row_stride, extent = shape[-1], None
    for size, step in zip(reversed(shape[:-1]), reversed(stride[:-1]), strict=True):
        if size == 1:
            continue
        if extent is None:
            row_stride = step
        elif step != extent:
            return None
        extent = step * size
    return row_stride


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where its rows have no single stride between them."""
    if tensor.is_contiguous() or collapsible(tensor) is not None:
        return tensor
    return tensor.contiguous()
