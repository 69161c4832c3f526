"""What neurons do to a model: evaluations, one file per method."""

from lapefast.evaluate.matrix import PerplexityMatrix, perplexity_matrix

__all__ = ["PerplexityMatrix", "perplexity_matrix"]
