"""Looking at products: what enters an FFN's last projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lapefast.models.parallel import refuse_split
from lapefast.models.structure import FFN, find_ffns

__all__ = ["watching_products"]


@contextmanager
def watching_products(model: nn.Module, see: Callable[[FFN, Tensor], None]) -> Iterator[list[FFN]]:
    """Within it, ``see`` is called with every FFN that runs and its product.

    The product has the shape that the FFN gives it, [..., width], and the model's dtype. A recorder
    or a steering may be placed as well; what is edited is seen edited.

    Yields:
        The model's FFNs, in model order.

    Raises:
        InputError: see `lapefast.models.find_sites`.
    """
    refuse_split(model, "looking at products")
    ffns = find_ffns(model)
    hooks = [
        ffn.last.register_forward_pre_hook(lambda module, given, ffn=ffn: see(ffn, given[0]))
        for ffn in ffns
    ]
    try:
        yield ffns
    finally:
        for hook in hooks:
            hook.remove()
