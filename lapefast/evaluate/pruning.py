"""What pruning experts for a language does to the text of every language (arXiv 2402.16367)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lapefast import __version__
from lapefast.detect.experts.pruning import pruned_experts, random_experts_like
from lapefast.detect.experts.result import Experts
from lapefast.errors import InputError
from lapefast.evaluate.likelihood import TokenLikelihood
from lapefast.evaluate.matrix import UNEDITED, PerplexityMatrix, matrix_of_passes
from lapefast.profiling.batches import CorpusPass

__all__ = ["pruning_matrix"]


def pruning_matrix(
    model: nn.Module,
    experts: Experts,
    corpora: Mapping[str, Any],
    tokenizer: Any = None,
    rate: float = 0.2,
    form: Literal["frequency", "layers"] = "frequency",
    labels: Sequence[str] | None = None,
    *,
    seq_len: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = 2**20,
    random_sets: int = 5,
    seed: int = 0,
    progress: bool = True,
    **text: Any,
) -> PerplexityMatrix:
    """Prune experts for each label in turn, and measure the likelihood of every label's text.

    Args:
        model: a causal language model with its head, the one that the experts were found in.
        experts: with the frequencies of the labels that are pruned for.
        corpora: label -> text that the experts were not found in.
        rate, form: see `lapefast.detect.experts.pruning.pruned_experts`.
        labels: those to prune for; None takes all of the experts'.
        random_sets: how many random choices of experts, as many in each layer, each label's
            pruning is compared with.
        tokenizer, seq_len, batch_size, max_tokens, seed, progress, text: as
            `lapefast.evaluate.perplexity_matrix` takes them.

    Returns:
        Rows are "none" (the unpruned model) and the labels that experts were pruned for; the
        random values are those of the random choices of experts.

    Raises:
        InputError: the experts do not fit the model, an argument is out of range, or as
            `lapefast.evaluate.perplexity_matrix`.
    """
    if random_sets < 1:
        raise InputError(f"random_sets must be at least 1, got {random_sets}")
    labels = list(experts.labels if labels is None else labels)
    if UNEDITED in labels:
        raise InputError(f"a label named {UNEDITED!r} stands for the unpruned model; rename it")
    generator = torch.Generator().manual_seed(seed)
    passes, pruned = [experts.members(torch.zeros_like(experts.chosen[0], dtype=torch.bool))], {}
    for label in labels:
        pruned[label] = pruned_experts(experts, label, rate, form)
        drawn = [random_experts_like(pruned[label], generator) for _ in range(random_sets)]
        passes += map(experts.members, [pruned[label], *drawn])
    passes = [neurons.bind(model) for neurons in passes]
    TokenLikelihood(model)  # refuses what predicts no next token
    read = CorpusPass(model, corpora, tokenizer, seq_len, batch_size, max_tokens, False, **text)
    texts = {label: [inputs["input_ids"] for inputs in read.inputs(label)] for label in read.labels}
    return matrix_of_passes(
        model,
        passes,
        labels,
        texts,
        {
            "model": experts.layout.model,
            "fingerprint": passes[0].fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "method": "experts",
            "pruning": form,
            "rate": rate,
            "experts": {label: of.sum(1).tolist() for label, of in pruned.items()},
            **read.metadata(),
            "max_tokens": max_tokens,
            "random_sets": random_sets,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "lapefast": __version__,
            "torch": torch.__version__,
        },
        progress,
    )
