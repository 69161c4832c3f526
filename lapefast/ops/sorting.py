"""Rows of keys in order, by the native library where there is one."""

from __future__ import annotations

import numpy as np
import torch

from lapefast.errors import InputError
from lapefast.ops.backends import native

__all__ = ["sort_rows"]


def sort_rows(keys: np.ndarray) -> None:
    """Sort each row by the upper 32 bits of its keys, as signed numbers, in place.

    In which order keys with the same upper bits end up is not said. One thread sorts, and without
    the interpreter's lock.

    Args:
        keys: int64 [rows, keys], contiguous and writable.

    Raises:
        InputError: others; nothing was sorted then.
    """
    if keys.dtype != np.int64 or keys.ndim != 2 or not keys.flags.carray:
        raise InputError(
            "keys must be int64 [rows, keys], contiguous and writable, got "
            f"{keys.dtype} {list(keys.shape)}"
        )
    if native.library is None:
        keys.sort(axis=1)
    else:
        native.library.sort_rows(torch.from_numpy(keys))
