"""Average-precision neurons (arXiv 2404.02431)."""

from __future__ import annotations

from lapefast.detect.average_precision.detector import AveragePrecisionNeurons, average_precision
from lapefast.detect.average_precision.scores import average_precision_scores

__all__ = ["AveragePrecisionNeurons", "average_precision", "average_precision_scores"]
