"""What neurons do at the last token of each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, evaluating, headless, is_encoder_decoder
from lapefast.models.inputs import forward_inputs, input_device
from lapefast.models.structure import FFN
from lapefast.models.taps import watching_products
from lapefast.recording import record

__all__ = ["LastTokens", "reading_last_tokens"]

LastTokens = dict[str, tuple[Tensor, Tensor]]
"""Site -> activations, float32 [texts, neurons], and products, in the model's dtype; on its device.
"""


@contextmanager
def reading_last_tokens(
    model: nn.Module, batch_size: int
) -> Iterator[tuple[list[FFN], Callable[[Sequence[list[int]]], LastTokens]]]:
    """Within it, a function that gives activations and products at each text's last token.

    The bare model runs, in eval mode and without gradient, over batches that are padded on the
    right. An encoder-decoder's decoder reads the same tokens, shifted right.

    Yields:
        The model's FFNs, in model order, and the function of lists of token ids.

    Raises:
        InputError: the model's FFNs can't be recorded, or one runs several times for each token;
            in the function, an activation or product is not finite.
    """
    bare, device = bare_model(model), input_device(model)
    at: tuple[Tensor, Tensor] = ()
    products: dict[str, Tensor] = {}

    def see(ffn: FFN, product: Tensor) -> None:
        by_token = product.reshape(*at[0].shape, product.shape[-1])  # some FFNs see no batch
        last = at[1].to(product.device)
        products[ffn.site.name] = by_token[torch.arange(len(last), device=last.device), last]

    def batch(texts: Sequence[list[int]]) -> LastTokens:
        nonlocal at
        ids = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in texts], batch_first=True)
        ids, lengths = ids.to(device), torch.tensor([len(one) for one in texts], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        # A group for each text, of one token: the sum over it is the activation itself.
        groups = torch.full_like(ids, -1)
        groups[torch.arange(len(ids), device=device), lengths - 1] = torch.arange(
            len(ids), device=device
        )
        at = groups, lengths - 1
        products.clear()
        recorder.set(groups=groups, decoder_groups=groups if is_encoder_decoder(bare) else None)
        bare(**forward_inputs(bare, ids, None if bool(mask.all()) else mask.long()))
        sums = {site: drained["sums"] for site, drained in recorder.drain().items()}
        for site in sums:
            if site not in products:
                raise InputError(f"{site}: this FFN did not run on the text, so it has no values")
            if not products[site].isfinite().all():
                raise InputError(
                    f"{site}: products are not finite (NaN or infinite), so what they contribute "
                    "means nothing; check the model's weights or use a wider dtype"
                )
        return {
            site: (activations[: len(ids)].float(), products[site])
            for site, activations in sums.items()
        }

    def read(texts: Sequence[list[int]]) -> LastTokens:
        batches = [
            batch(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)
        ]
        return {
            site: tuple(map(torch.cat, zip(*(one[site] for one in batches), strict=True)))
            for site in batches[0]
        }

    groups = [str(row) for row in range(batch_size)]
    with (
        evaluating(model),
        headless(bare),
        torch.no_grad(),
        record(model, groups, ("sums",)) as recorder,
        watching_products(model, see) as ffns,
    ):
        for site in recorder.sites:
            if site.calls > 1:
                raise InputError(
                    f"{site.name}: {site.calls} layers of {type(bare).__name__} share this FFN, so "
                    "a neuron has no single activation at a token; sharing needs an FFN per layer"
                )
        yield ffns, read
