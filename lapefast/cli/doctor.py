"""`lapefast doctor`: what was found on this machine."""

from __future__ import annotations

__all__ = ["doctor"]


def doctor() -> None:
    """Say which backend would serve each device, and why the others would not.

    Example: `lapefast doctor`
    """
    from lapefast.doctor import diagnose

    print(diagnose())
