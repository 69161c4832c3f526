"""What neurons do to a model: evaluations, one file per method."""

from lapefast.evaluate.categories import CategoryDeactivation, category_deactivation
from lapefast.evaluate.matrix import PerplexityMatrix, perplexity_matrix
from lapefast.evaluate.pruning import pruning_matrix
from lapefast.evaluate.sampling import SampledLanguages, sampled_languages
from lapefast.evaluate.stability import Stability, UntilStable, stability
from lapefast.evaluate.sweep import Sweep, sweep

__all__ = [
    "CategoryDeactivation",
    "PerplexityMatrix",
    "SampledLanguages",
    "Stability",
    "Sweep",
    "UntilStable",
    "category_deactivation",
    "perplexity_matrix",
    "pruning_matrix",
    "sampled_languages",
    "stability",
    "sweep",
]
