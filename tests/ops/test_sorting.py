"""Rows of keys in order, by the native library and without it, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

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
@pytest.mark.parametrize("spread", [1, 3, 2**31 - 1])
def test_rows_are_in_the_order_of_their_upper_halves_and_hold_what_they_held(sorts, width, spread):
    rng = np.random.default_rng(width)
    upper = rng.integers(-spread, spread, (5, width), dtype=np.int64)
    keys = (upper << 32) + rng.integers(0, 7, (5, width))
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


@needs_library
@pytest.mark.parametrize(
    "keys",
    [
        np.zeros((3, 4), np.int32),
        np.zeros((3, 4)),
        np.zeros(4, np.int64),
        np.zeros((2, 3, 4), np.int64),
        np.zeros((4, 6), np.int64)[:, ::2],
        np.lib.stride_tricks.as_strided(np.zeros(4, np.int64), (3, 4), (0, 8)),
    ],
    ids=["int32", "float64", "one dimension", "three dimensions", "strided", "overlapping"],
)
def test_the_library_refuses_other_keys(keys):
    with pytest.raises(InputError, match="keys"):
        sort_rows(keys)
