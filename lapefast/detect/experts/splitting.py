"""A dense FFN's neurons split into experts of equal size, without training (arXiv 2402.16367)."""

from __future__ import annotations

from torch import Tensor, nn

from lapefast.detect.experts.clustering import size_constrained_kmeans
from lapefast.errors import InputError
from lapefast.models.projections import up_projection
from lapefast.models.structure import FFN, find_ffns
from lapefast.steering.linear import dense_weight

__all__ = ["split_ffns", "up_rows"]


def split_ffns(model: nn.Module, experts: int, seed: int = 0) -> dict[str, Tensor]:
    """Which expert each neuron belongs to: site -> int64 [width], 0 to experts - 1.

    Per FFN, the rows of the up projection (of a plain FFN: of its first), L2-normalised, are
    clustered by size-constrained k-means; an expert has floor or ceil of width / experts neurons.
    A neuron's rows of gate and up and its column of down go together, so that all experts' outputs
    add up to the FFN's. A row of zeros stays one.

    Args:
        model: any whose FFNs `lapefast.models.find_sites` finds, with weights of a dtype
            from float64 to bfloat16; they are clustered in float32.
        experts: per FFN, at most as many as its neurons.
        seed: of the k-means. The same model, seed and number of threads give the same experts.

    Raises:
        InputError: too many or too few experts; an up projection that is quantised, adapted or
            offloaded, that cannot be told from the gate, or whose weights are not finite.
    """
    clusters = {}
    for ffn in find_ffns(model):
        rows = nn.functional.normalize(up_rows(ffn), dim=1)
        try:
            clusters[ffn.site.name] = size_constrained_kmeans(rows, experts, seed)
        except InputError as error:
            raise InputError(f"{ffn.site.name}: {error}") from error
    return clusters


def up_rows(ffn: FFN) -> Tensor:
    """The up projection's weight, of a plain FFN the first one's, as float32 [width, hidden].

    Raises:
        InputError: it is quantised, adapted or offloaded, or cannot be told from the gate.
    """
    up, first = up_projection(ffn)
    try:
        weight = dense_weight(up, ffn.site.name)
    except InputError as error:
        raise InputError(
            f"{ffn.site.name}: experts are clusters of the up projection's weights, but its "
            f"{type(up).__name__} is quantised, adapted or offloaded; load the model in float32, "
            "float16 or bfloat16, and merge adapters first"
        ) from error
    return weight[first : first + ffn.site.width].float()
