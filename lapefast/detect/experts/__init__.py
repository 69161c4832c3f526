"""Experts: groups of an FFN's neurons, and which of them tokens use (arXiv 2402.16367)."""

from __future__ import annotations

from lapefast.detect.experts.detector import experts
from lapefast.detect.experts.pruning import prune
from lapefast.detect.experts.result import Experts
from lapefast.detect.experts.use import ExpertUse

__all__ = ["ExpertUse", "Experts", "experts", "prune"]
