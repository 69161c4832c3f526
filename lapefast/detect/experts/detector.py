"""Experts: groups of an FFN's neurons, and how often the tokens of each label choose them.

Liu et al., EMNLP 2024, "Unraveling Babel", arXiv 2402.16367.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lapefast.detect.experts.result import Experts
from lapefast.detect.experts.splitting import split_ffns
from lapefast.detect.experts.use import ExpertUse, Form, check_choice
from lapefast.models.bare import bare_model, evaluating, headless, is_encoder_decoder
from lapefast.profiling.about import about_run
from lapefast.profiling.documents import DocumentPass

__all__ = ["experts"]


def experts(
    model: nn.Module,
    corpora: Mapping[str, Any],
    tokenizer: Any = None,
    experts: int = 256,
    share: float = 0.1,
    form: Form = "identity",
    seed: int = 0,
    clusters: Mapping[str, Tensor] | None = None,
    seq_len: int | None = None,
    max_documents: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    *,
    longer: Literal["cut", "drop"] = "cut",
    **text: Any,
) -> Experts:
    """Split every FFN of ``model`` into experts and count which ones each label's tokens choose.

    Nothing is trained and nothing of the model is changed. Neurons are grouped by
    `lapefast.detect.experts.splitting.split_ffns`, and tokens choose as in
    `lapefast.detect.experts.use.ExpertUse`. One pass of the bare model, a document a row.

    Args:
        model: any whose FFNs `lapefast.models.find_sites` finds, each run once in a forward pass.
        corpora: label -> text or token ids, in any form that `lapefast.corpus.Corpus` reads.
        tokenizer: needed for text.
        experts: per layer, at most as many as a layer's neurons.
        share: of all (layer, expert) pairs, how many each token chooses. The paper, as far as we
            have read it, does not say how many.
        form: what is summed over an expert's neurons: the product ("identity"), its "absolute"
            value or its "positive" part.
        seed: of the clustering.
        clusters: instead of clustering anew, those of an earlier result.
        seq_len: the longest document, in tokens; None is the smaller of the model's limit and
            2,048.
        max_documents: of each label; None reads all.
        batch_size: documents per forward pass; None chooses one that fits the memory.
        progress: show a bar.
        longer, text: see `lapefast.profiling.documents.DocumentPass`.

    Raises:
        InputError: for what is wrong with the model, the corpora or the arguments, and for
            products that are not finite.
    """
    check_choice(share, form)
    documents = DocumentPass(
        model, corpora, tokenizer, seq_len, longer, max_documents, batch_size, progress, **text
    )
    splits = split_ffns(model, experts, seed) if clusters is None else clusters
    bare = bare_model(model)
    with (
        ExpertUse(model, documents.labels, splits, share, form) as use,
        evaluating(model),
        headless(bare),
        torch.no_grad(),
    ):
        for label in documents.labels:
            for batch in documents.batches(label):
                decoder_mask = batch.mask if is_encoder_decoder(bare) else None
                use.set(label=label, mask=batch.mask, decoder_mask=decoder_mask)
                bare(**batch.inputs)
    metadata = {
        "method": "experts",
        "experts": use.chosen.shape[2],
        "share": share,
        "form": form,
        **({"seed": seed} if clusters is None else {"clusters": "given"}),
        **about_run(model, tokenizer),
        **documents.metadata(),
    }
    return Experts(documents.labels, splits, use.chosen, use.tokens, metadata)
