"""Hugging Face data sets as sources. `datasets` is imported only where one is used."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lapefast.corpus.pieces import choose_field
from lapefast.errors import InputError

__all__ = ["column", "describe", "is_data_set", "is_saved", "load", "load_saved"]

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_BATCH = 256


def is_data_set(given: Any) -> bool:
    """Whether this is a Dataset, an IterableDataset, or a dict of splits of either."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(
        given,
        (
            datasets.Dataset,
            datasets.IterableDataset,
            datasets.DatasetDict,
            datasets.IterableDatasetDict,
        ),
    )


def describe(data_set: Any) -> str:
    """A name for a data set in memory."""
    info = getattr(data_set, "info", None)
    parts = (getattr(info, "dataset_name", None), getattr(info, "config_name", None))
    named = ":".join(filter(None, (*parts, str(getattr(data_set, "split", None) or ""))))
    return named or type(data_set).__name__


def is_saved(path: str) -> bool:
    """Whether a path is a directory that `save_to_disk` wrote."""
    return os.path.exists(os.path.join(path, "state.json")) or _has_splits(path)


def load_saved(path: str, split: str | None) -> Any:
    """The data set that `save_to_disk` wrote at `path`, memory-mapped."""
    import datasets

    try:
        data_set = datasets.load_from_disk(path)
    except Exception as error:  # whatever it is, the directory can't be read
        raise InputError(f"{path} cannot be read as a saved data set: {_first(error)}") from error
    return _one_split(data_set, os.path.basename(path.rstrip(os.sep)), split)


def load(name: str, config: str, split: str | None) -> Any:
    """A data set by `name:config:split`: saved on disk, a local directory, or from the hub.

    An empty config is the default one, and an empty split is `train`. What isn't saved on disk is
    streamed by `datasets.load_dataset`, which needs the network for names of the hub.
    """
    path = os.path.expanduser(name)
    if is_saved(path):
        return load_saved(path, split or ("train" if _has_splits(path) else None))
    if not os.path.exists(path) and not _HUB_NAME.fullmatch(name):
        raise InputError(f"{name} does not exist, and is no name of a data set")
    import datasets

    try:
        return datasets.load_dataset(
            path if os.path.exists(path) else name,
            config or None,
            split=split or "train",
            streaming=True,
        )
    except Exception as error:  # the library raises many kinds, of its own and of its transports
        raise InputError(f"data set {name} cannot be loaded: {_first(error)}") from error


def column(
    data_set: Any, name: str, field: str, prefer_ids: bool
) -> tuple[Callable[[], Iterator[Any]], int | None, int | None]:
    """How to iterate a data set's documents, how many there are, and their length if it is fixed.

    The length is that of a column of lists of one declared length, as packed token ids are stored.
    """
    data_set = _one_split(data_set, name, None).with_format(None)
    total = getattr(data_set, "num_rows", None)
    names = data_set.column_names
    if names is None:  # a stream that knows its columns only once it is read
        return lambda: iter(data_set), total, None
    try:
        chosen = choose_field(field, names, prefer_ids)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    data_set = data_set.select_columns([chosen])
    length = getattr((data_set.features or {}).get(chosen), "length", None)
    row_length = length if length is not None and length > 0 else None

    def iterate() -> Iterator[Any]:
        for batch in data_set.iter(batch_size=_BATCH):
            yield from batch[chosen]

    return iterate, total, row_length


def _has_splits(path: str) -> bool:
    return os.path.exists(os.path.join(path, "dataset_dict.json"))


def _one_split(data_set: Any, name: str, split: str | None) -> Any:
    if not isinstance(data_set, dict):
        if split:
            raise InputError(f"data set {name} was saved without splits, so {split} is not there")
        return data_set
    if split is None and len(data_set) == 1:
        return next(iter(data_set.values()))
    if split not in data_set:
        raise InputError(
            f"data set {name} has the splits {', '.join(data_set)}; choose one, "
            f"by name:config:split or dataset[split]"
        )
    return data_set[split]


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
