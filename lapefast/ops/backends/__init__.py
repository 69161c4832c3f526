"""Who computes the ops.

`cpu` and `cuda` (the native library), `triton`, or `reference` (plain PyTorch).
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

from lapefast.errors import InputError
from lapefast.ops.backends import cpu, cuda, reference, triton

__all__ = ["BACKENDS", "backend_for", "why_not"]

_log = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}
# What "auto" tries, in this order. Triton's interpreter serves the CPU too, but only for tests.
_BEST = {"cpu": ("cpu", "reference")}
_BEST_ELSEWHERE = ("cuda", "triton", "reference")


@functools.cache
def backend_for(name: str, device_type: str) -> ModuleType:
    """The backend of that name, or the best one for the device if the name is "auto".

    Raises InputError if there is none of that name or it cannot serve the device.
    """
    if name == "auto":
        reasons = {
            other: why_not(other, device_type) for other in _BEST.get(device_type, _BEST_ELSEWHERE)
        }
        best = next(other for other, reason in reasons.items() if reason is None)
        if best == "reference":
            why = " ".join(f"{other}: {reason}" for other, reason in reasons.items() if reason)
            _log.warning("Ops run on the slower reference backend. %s", why)
        return BACKENDS[best]
    if name not in BACKENDS:
        raise InputError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}.")
    reason = why_not(name, device_type)
    if reason is not None:
        raise InputError(f"Backend {name!r} cannot compute on {device_type}: {reason}")
    return BACKENDS[name]


def why_not(name: str, device_type: str) -> str | None:
    """Why a backend cannot serve a device type, in one sentence; None if it can."""
    return BACKENDS[name].why_not(device_type)
