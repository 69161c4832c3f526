"""What neurons do to a model: evaluations, one file per method."""

from lapefast.evaluate.matrix import PerplexityMatrix, perplexity_matrix
from lapefast.evaluate.sweep import Sweep, sweep

__all__ = ["PerplexityMatrix", "Sweep", "perplexity_matrix", "sweep"]
