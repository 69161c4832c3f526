"""The ops on the CPU, computed by the native library `lapefast._native`."""

from __future__ import annotations

__all__ = ["why_not"]

try:
    from lapefast import _native
except ImportError as error:
    _native = None
    _missing = str(error)


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve a device type; None if it can."""
    if device_type != "cpu":
        return "it computes tensors on the CPU only."
    if _native is None:
        return (
            f"the native library is missing ({_missing}); install lapefast with a C++ compiler "
            "at hand and without LAPEFAST_BUILD_NATIVE=0."
        )
    return None
