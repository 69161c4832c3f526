"""What a recorder takes, and what its ops say afterwards."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lapefast.errors import InputError
from lapefast.labels import check_names
from lapefast.profiles import STATISTICS

__all__ = ["check_flags", "check_labels", "check_statistics", "check_threshold"]


def check_labels(labels: Sequence[str]) -> list[str]:
    """The labels, distinct names. Raises InputError."""
    if isinstance(labels, str) or not labels or not all(isinstance(one, str) for one in labels):
        raise InputError(f"labels must be a list of names, got {labels!r}")
    check_names(labels)
    if len(set(labels)) != len(labels):
        raise InputError(f"labels must differ, got {', '.join(labels)}")
    return list(labels)


def check_flags(site: str, flags: Tensor) -> None:
    """Raise InputError for what the statistics ops counted in `flags`, int64 [2], at a site."""
    non_finite, outside = flags.tolist()
    if non_finite:
        raise InputError(
            f"{site}: {non_finite} activations are not finite (NaN or infinite), so what "
            "they count means nothing; check the model's weights or use a wider dtype"
        )
    if outside:
        raise InputError(f"{site}: {outside} group indices lie outside the labels")


def check_statistics(statistics: Sequence[str]) -> tuple[str, ...]:
    """The statistics in the order of `STATISTICS`. Raises InputError for unknown ones, or none."""
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    unknown = [name for name in names if name not in STATISTICS]
    if unknown or not names:
        raise InputError(
            f"statistics must be some of {', '.join(STATISTICS)}, got {unknown or 'none'}"
        )
    # Shards add up to the counts.
    names += ("counts",) if "shard_counts" in names else ()
    return tuple(name for name in STATISTICS if name in names)


def check_threshold(threshold: float) -> float:
    """The threshold as a number. Raises InputError for what is none."""
    try:
        number = float(threshold)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number:
        raise InputError(f"threshold must be a number, got {threshold!r}")
    return number
