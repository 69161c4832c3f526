"""Sharing: which labels of a parallel example a neuron is active for (arXiv 2406.09265)."""

from __future__ import annotations

from lapefast.detect.sharing.categories import Category, sharing_categories
from lapefast.detect.sharing.detector import sharing
from lapefast.detect.sharing.result import Sharing

__all__ = ["Category", "Sharing", "sharing", "sharing_categories"]
