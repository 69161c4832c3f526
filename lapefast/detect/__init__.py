"""Detectors: from profiles or texts to the neurons of each label. One file per method."""

from __future__ import annotations

from lapefast.detect.lape import lape
from lapefast.detect.plnd import plnd
from lapefast.detect.zones import zones

__all__ = ["lape", "plnd", "zones"]
