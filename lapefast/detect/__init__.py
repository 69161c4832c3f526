"""Detectors: from profiles or texts to the neurons of each label. One file per method."""

from __future__ import annotations

from lapefast.detect.lape import lape

__all__ = ["lape"]
