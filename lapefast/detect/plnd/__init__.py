"""PLND: parallel language-specific neuron detection (arXiv 2402.18815)."""

from __future__ import annotations

from lapefast.detect.plnd.detector import PLND, plnd
from lapefast.detect.plnd.zones import zones

__all__ = ["PLND", "plnd", "zones"]
