"""Rows of scores in order, by the native library and without it, against a plain sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lapefast.errors import InputError
from lapefast.ops.backends import native
from lapefast.ops.ranking import rank_rows

needs_library = pytest.mark.skipif(
    native.library is None,
    reason="no native library is here; installing with a C++ compiler at hand lifts it",
)


@pytest.fixture(params=[pytest.param("the library", marks=needs_library), "NumPy"])
def ranks(request, monkeypatch):
    if request.param == "NumPy":
        monkeypatch.setattr(native, "library", None)
    return rank_rows


def assert_ranked(ranks, scores):
    """What `rank_rows` says of columns that are a class each."""
    classes = np.arange(scores.shape[1], dtype=np.int32)
    ordered, last = ranks(scores, classes)
    assert (ordered.dtype, last.dtype) == (np.int32, bool)
    found = np.take_along_axis(scores, ordered, axis=1)
    assert np.array_equal(found, -np.sort(-scores, axis=1))
    assert np.array_equal(np.sort(ordered, axis=1), np.broadcast_to(classes, scores.shape))
    next_lower = np.append(found[:, :-1] > found[:, 1:], np.ones((len(found), 1), bool), axis=1)
    assert np.array_equal(last, next_lower[:, : scores.shape[1]])


@pytest.mark.parametrize("width", [0, 1, 2, 255, 1023, 1024, 3000])
@pytest.mark.parametrize(
    "bits", [0, 0xFF, 0xFF00, 0x3FF800, 0x80000001, 0xFF00FF, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex
)
def test_scores_that_differ_in_few_digits_or_in_all(ranks, width, bits):
    rng = np.random.default_rng(width)
    drawn = rng.integers(0, 2**32, (5, width), dtype=np.uint32) & np.uint32(bits)
    scores = drawn.view(np.float32)
    assert_ranked(ranks, np.where(np.isnan(scores), np.float32(1), scores))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_and_infinite_scores(ranks, dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    scores = np.array([[-0.0, -np.inf, 0.0, np.inf, tiny, -tiny, 1.5, np.inf]], dtype)
    assert_ranked(ranks, scores)
    assert ranks(scores, np.zeros(8, np.int32))[1].sum() == 6


def test_classes_go_with_their_scores_whatever_number_they_have(ranks):
    scores = np.array([[3.0, 1.0, 2.0], [-1.0, 0.0, -2.0]], np.float32)
    ordered, last = ranks(scores, np.array([-7, 2**31 - 1, 0], np.int32))
    assert ordered.tolist() == [[-7, 0, 2**31 - 1], [2**31 - 1, -7, 0]]
    assert last.all()


def test_what_is_read_only_or_lies_by_column_is_ranked_and_left_alone(ranks):
    scores = np.array([[3.0, 1.0], [2.0, 4.0], [1.0, 5.0]], np.float32)
    scores.flags.writeable = False
    assert ranks(scores, np.arange(2, dtype=np.int32))[0].tolist() == [[0, 1], [1, 0], [1, 0]]
    assert ranks(scores.T, np.arange(3, dtype=np.int32))[0].tolist() == [[0, 1, 2], [2, 1, 0]]
    assert scores.tolist() == [[3.0, 1.0], [2.0, 4.0], [1.0, 5.0]]


@needs_library
@pytest.mark.parametrize(
    ("which", "other"),
    [
        (0, torch.zeros(3, 4, dtype=torch.float64)),
        (0, torch.zeros(12)),
        (0, torch.zeros(3, 8)[:, ::2]),
        (0, torch.zeros(1, 4).expand(3, 4)),
        (0, torch.zeros(3, 5)),
        (0, torch.zeros(0, 2**32)),
        (1, torch.zeros(3, dtype=torch.int32)),
        (1, torch.zeros(4, dtype=torch.int64)),
        (2, torch.zeros(2, 4, dtype=torch.int32)),
        (2, torch.zeros(3, 4)),
        (3, torch.zeros(3, 4, dtype=torch.bool)),
        (3, torch.zeros(4, 4, dtype=torch.int8)),
    ],
)
def test_the_library_refuses_what_does_not_fit_and_writes_nothing(which, other):
    given = [
        torch.tensor([[3.0, 1.0, 2.0, 0.0]] * 3),
        torch.arange(4, dtype=torch.int32),
        torch.full((3, 4), 9, dtype=torch.int32),
        torch.full((3, 4), 9, dtype=torch.int8),
    ]
    given[which] = other
    before = [tensor.clone() for tensor in given]
    with pytest.raises(InputError, match="scores|classes|ordered|last"):
        native.library.rank_rows(*given)
    assert all(map(torch.equal, given, before))
