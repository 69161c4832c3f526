"""lapefast: find and control language-specific neurons at the cost of an ordinary forward pass.

Importing it touches no GPU and no network and compiles nothing; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "InputError": "lapefast.errors",
    "Profile": "lapefast.profiles",
    "profile": "lapefast.profiling.run",
    "record": "lapefast.recording",
    "NeuronSets": "lapefast.neurons",
    "Edit": "lapefast.neurons",
    "deactivate": "lapefast.neurons",
    "activate": "lapefast.neurons",
    "scale": "lapefast.neurons",
    "compare": "lapefast.neurons",
    "Comparison": "lapefast.neurons",
    "add": "lapefast.neurons",
    "steer": "lapefast.steering",
    "fold": "lapefast.steering",
    "ResidualMeans": "lapefast.steering.diffmean",
    "residual_means": "lapefast.steering.diffmean",
}
_MODULES = ("detect", "evaluate", "export", "train")

__all__ = ["__version__", *_EXPORTS, *_MODULES]

if TYPE_CHECKING:
    from lapefast import detect, evaluate, export, train
    from lapefast.errors import InputError
    from lapefast.neurons import (
        Comparison,
        Edit,
        NeuronSets,
        activate,
        add,
        compare,
        deactivate,
        scale,
    )
    from lapefast.profiles import Profile
    from lapefast.profiling.run import profile
    from lapefast.recording import record
    from lapefast.steering import fold, steer
    from lapefast.steering.diffmean import ResidualMeans, residual_means


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
