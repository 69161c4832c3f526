"""Detectors: from profiles or texts to the neurons of each label. One file or folder per method."""

from __future__ import annotations

from lapefast.detect.average_precision import (
    AveragePrecisionNeurons,
    average_precision,
    average_precision_scores,
)
from lapefast.detect.experts import Experts, ExpertUse, experts, prune
from lapefast.detect.lape import lape
from lapefast.detect.plnd import PLND, plnd, zones
from lapefast.detect.sharing import Category, Sharing, sharing, sharing_categories

__all__ = [
    "PLND",
    "AveragePrecisionNeurons",
    "Category",
    "ExpertUse",
    "Experts",
    "Sharing",
    "average_precision",
    "average_precision_scores",
    "experts",
    "lape",
    "plnd",
    "prune",
    "sharing",
    "sharing_categories",
    "zones",
]
