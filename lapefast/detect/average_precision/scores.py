"""Average precision of many units at once, as Kojima et al. (NAACL 2024, arXiv 2404.02431) use it.

Each unit's texts are sorted once, whatever the number of labels, and without the interpreter's
lock, so that units are shared out among threads.
"""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapefast.errors import InputError
from lapefast.ops.ranking import rank_rows

__all__ = ["average_precision_scores", "class_precision_scores", "give_back"]

# Scores that one thread ranks at a time. On two cores of an EPYC a unit of 3,000 texts takes 13 us;
# with half as many 15, as the interpreter's lock then changes hands more often; with twice as many
# 20, as the system takes each piece's memory back, to hand it out page by page for the next.
_AT_ONCE = 1 << 17
_MAPPED = 1 << 28  # bytes of a memory map that are read before its pages are given back


def average_precision_scores(scores: Any, labels: Any) -> Tensor:
    """How well each unit tells the positive texts from the others.

    ``AP = sum_n (R_n - R_{n-1}) P_n`` over the distinct scores, descending, with R_n the recall and
    P_n the precision of calling every text positive whose score is at least the n-th; equal scores
    form one group. It is 1 where every positive text lies above every other one, and the share of
    positive texts where all scores are equal.

    Args:
        scores: [units, texts], a tensor or array of any strides; half-precision numbers and
            integers up to 16 bits are taken as float32, the others as float64. Infinities are
            ordered like numbers. A `numpy.memmap` is read in pieces and never held.
        labels: bool or 0 and 1, [texts]; 1 is positive.

    Returns:
        float64 [units], computed by ``torch.get_num_threads()`` threads.

    Raises:
        InputError: other shapes, a NaN, labels other than 0 and 1, or none that is positive.
    """
    labels = _array(labels, "labels")
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise InputError(
            "labels must be bool or 0 and 1 of shape [texts], got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    if not labels.any():
        raise InputError("labels must mark at least one text as positive, got none")
    return class_precision_scores(scores, 1 - labels.astype(np.int32), 1)[0]


def class_precision_scores(scores: Any, classes: Any, count: int) -> Tensor:
    """`average_precision_scores` with each class in turn as the positive one.

    Args:
        scores: as there.
        classes: integers [texts]: the class of each text, counted from 0.
        count: of the classes 0 to count - 1, each of which needs a text.

    Returns:
        float64 [count, units].

    Raises:
        InputError: other shapes, a NaN, or a class without a text.
    """
    scores, classes = _array(scores, "scores"), _array(classes, "classes").astype(np.int32)
    if scores.ndim != 2 or scores.shape[1:] != classes.shape or scores.dtype.kind not in "fiub":
        raise InputError(
            f"scores must be real numbers [units, texts] = [units, {classes.size}], got "
            f"{scores.dtype} {list(scores.shape)}"
        )
    for label in range(count):
        if not (classes == label).any():
            raise InputError(f"class {label} has no text, so there is no average precision of it")
    units, texts = scores.shape
    narrow = np.result_type(scores.dtype, np.float32) == np.float32
    dtype = np.float32 if narrow else np.float64
    step = max(1, _AT_ONCE // texts)
    between = step * max(1, _MAPPED // (step * texts * scores.itemsize))
    result = np.empty((count, units))

    def compute(start: int) -> None:
        part = slice(start, start + step)
        ranked = _by_unit(scores[part], dtype)
        if np.isnan(ranked.max()):
            unit = start + int(np.isnan(ranked).any(1).argmax())
            raise InputError(f"the scores of unit {unit} hold a NaN; they must be numbers")
        ordered, last = rank_rows(ranked, classes)
        for label in range(count):
            result[label, part] = _precision(ordered == label, last)
        if start % between == 0:
            give_back(scores)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(compute, range(0, units, step)):
            pass
    return torch.from_numpy(result)


def _by_unit(part: np.ndarray, dtype: type) -> np.ndarray:
    """Contiguous, and a copy only where it must be.

    What lies by text is first brought together as it lies: turned round in the cache then, it takes
    a quarter of the time.
    """
    if not part.flags.c_contiguous:
        part = part.copy(order="K")
    return np.ascontiguousarray(part, dtype)


def _precision(positive: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Average precision of units whose texts are in order, float64 [units]; see `rank_rows`.

    The mean over positive texts of TP / (TP + FP) at their scores: among the positive ones, and
    among all, how many have no lower score.
    """
    units, texts = positive.shape
    places = np.flatnonzero(positive).reshape(units, -1)  # every unit has the same positive texts
    places -= np.arange(0, units * texts, texts)[:, None]
    above = np.arange(1.0, places.shape[1] + 1)
    rank = places + 1.0
    precision = above / rank
    (tied,) = np.nonzero(~last.all(1))
    if len(tied):
        ends = _run_ends(last[tied])
        ranks = np.take_along_axis(ends, places[tied], axis=1)
        same = np.ones(ranks.shape, bool)
        np.not_equal(ranks[:, 1:], ranks[:, :-1], out=same[:, :-1])
        precision[tied] = _run_ends(same) / ranks
    return precision.mean(1)


def _run_ends(last: np.ndarray) -> np.ndarray:
    """For each place of each row, how many places there are up to the next that is a run's last."""
    ends = np.where(last, np.arange(1, last.shape[1] + 1), last.shape[1])
    return np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]


def _array(values: Any, what: str) -> np.ndarray:
    """As an array, without a copy; half precision that NumPy does not know as float32."""
    tensor = isinstance(values, Tensor)
    try:
        if tensor:
            values = values.detach().cpu()
            return (values.float() if values.dtype is torch.bfloat16 else values).numpy()
        return values if isinstance(values, np.ndarray) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        form = f"a {values.layout} tensor of {values.dtype}" if tensor else f"{values!r:.60}"
        raise InputError(
            f"{what} must be an array, or a dense tensor of a dtype that NumPy knows, got {form}"
        ) from error


def give_back(scores: np.ndarray) -> None:
    """Let the pages of a memory map go that were read: they count as the process's memory.

    Not where it is private to the process (mode "c"), since what was changed there would be lost.
    """
    mapped = getattr(scores, "_mmap", None)
    if mapped is not None and scores.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
