"""Detectors: from profiles or texts to the neurons of each label. One file or folder per method."""

from __future__ import annotations

from lapefast.detect.average_precision import (
    AveragePrecisionNeurons,
    average_precision,
    average_precision_scores,
)
from lapefast.detect.lape import lape
from lapefast.detect.plnd import PLND, plnd, zones
from lapefast.detect.sharing import Category, Sharing, sharing, sharing_categories

__all__ = [
    "PLND",
    "AveragePrecisionNeurons",
    "Category",
    "Sharing",
    "average_precision",
    "average_precision_scores",
    "lape",
    "plnd",
    "sharing",
    "sharing_categories",
    "zones",
]
