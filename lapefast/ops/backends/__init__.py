"""Who computes the ops: `cpu` (the native library) or `reference` (plain PyTorch)."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

from lapefast.errors import InputError
from lapefast.ops.backends import cpu, reference

__all__ = ["BACKENDS", "backend_for", "why_not"]

_log = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}


@functools.cache
def backend_for(name: str, device_type: str) -> ModuleType:
    """The backend of that name, or the best one for the device if the name is "auto".

    Raises InputError if there is none of that name or it cannot serve the device.
    """
    if name == "auto":
        reason = why_not("cpu", device_type)
        if reason is None:
            return cpu
        if device_type == "cpu":
            _log.warning("Ops run on the slower reference backend: %s", reason)
        return reference
    if name not in BACKENDS:
        raise InputError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}.")
    reason = why_not(name, device_type)
    if reason is not None:
        raise InputError(f"Backend {name!r} cannot compute on {device_type}: {reason}")
    return BACKENDS[name]


def why_not(name: str, device_type: str) -> str | None:
    """Why a backend cannot serve a device type, in one sentence; None if it can."""
    return BACKENDS[name].why_not(device_type)
