"""Rows of keys in order, by the native library and without it, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lapefast.errors import InputError
from lapefast.ops.backends import native
from lapefast.ops.sorting import sort_rows

needs_library = pytest.mark.skipif(native.library is None, reason="no native library is here")


@pytest.fixture(params=[pytest.param("the library", marks=needs_library), "NumPy"])
def sorts(request, monkeypatch):
    if request.param == "NumPy":
        monkeypatch.setattr(native, "library", None)
    return sort_rows


@pytest.mark.parametrize("width", [0, 1, 2, 255, 1023, 1024, 3000])
@pytest.mark.parametrize(
    "bits", [0, 0xFF, 0xFF00, 0x3FF800, 0x80000001, 0xFF00FF, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex
)
def test_rows_are_in_the_order_of_their_upper_halves_and_hold_what_they_held(sorts, width, bits):
    """Upper halves differ in ``bits`` only: in few of the digits that are sorted by, or in all."""
    rng = np.random.default_rng(width)
    keys = rng.integers(0, 2**64, (5, width), dtype=np.uint64) & np.uint64((bits << 32) + 7)
    keys = keys.view(np.int64)
    before = keys.copy()
    sorts(keys)
    assert np.array_equal(keys >> 32, np.sort(before >> 32, axis=1))
    assert np.array_equal(np.sort(keys, axis=1), np.sort(before, axis=1))


def test_the_ends_of_the_range_keep_their_places(sorts):
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    keys = np.array([[high, 0, -1, low, 1 << 32, -(1 << 32)]])
    sorts(keys)
    assert keys[0, [0, -1]].tolist() == [low, high]
    assert (keys[0] >> 32).tolist() == sorted((keys[0] >> 32).tolist())


def read_only():
    keys = np.zeros((3, 4), np.int64)
    keys.flags.writeable = False
    return keys


@pytest.mark.parametrize(
    "keys",
    [
        np.zeros((3, 4), np.int32),
        np.zeros((3, 4)),
        np.zeros(4, np.int64),
        np.zeros((2, 3, 4), np.int64),
        np.zeros((4, 6), np.int64)[:, ::2],
        np.lib.stride_tricks.as_strided(np.zeros(4, np.int64), (3, 4), (0, 8)),
        np.zeros((3, 4), np.int64)[:, ::-1],
        np.zeros((3, 4), ">i8"),
        np.zeros(97, np.uint8)[1:].view(np.int64).reshape(3, 4),
        read_only(),
    ],
    ids=[
        "int32",
        "float64",
        "one dimension",
        "three dimensions",
        "strided",
        "overlapping",
        "backwards",
        "bytes in the other order",
        "unaligned",
        "read-only",
    ],
)
def test_other_keys_are_refused(sorts, keys):
    with pytest.raises(InputError, match=r"keys must be int64 \[rows, keys\]"):
        sorts(keys)


@needs_library
@pytest.mark.parametrize(
    "keys",
    [
        torch.zeros(3, 4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, 6, dtype=torch.int64)[:, ::2],
        torch.zeros(1, 4, dtype=torch.int64).expand(3, 4),
    ],
    ids=["int32", "one dimension", "strided", "overlapping"],
)
def test_the_library_refuses_other_tensors(keys):
    with pytest.raises(InputError, match="keys"):
        native.library.sort_rows(keys)
