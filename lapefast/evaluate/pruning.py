"""What pruning experts for a language does to the text of every language (arXiv 2402.16367)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lapefast import __version__
from lapefast.detect.experts.pruning import pruned_experts, random_experts_like
from lapefast.detect.experts.result import Experts
from lapefast.errors import InputError
from lapefast.evaluate.likelihood import TokenLikelihood
from lapefast.evaluate.matrix import PerplexityMatrix
from lapefast.models.bare import evaluating
from lapefast.neurons import NeuronSet, deactivate
from lapefast.profiling.batches import CorpusPass
from lapefast.steering import steer

__all__ = ["pruning_matrix"]

_UNPRUNED = "none"


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
        corpora: label -> text that the experts were not found in, as for `lapefast.profile`.
        tokenizer: for texts.
        rate, form: see `lapefast.detect.experts.pruning.pruned_experts`.
        labels: those to prune for; None takes all of the experts'.
        seq_len, batch_size, max_tokens: as for `lapefast.evaluate.perplexity_matrix`.
        random_sets: how many random choices of experts, as many in each layer, each label's
            pruning is compared with.
        seed: of the random choices.
        progress: show a bar.
        text: `document`, `field`, `special_tokens`.

    Returns:
        Rows are "none" (the unpruned model) and the labels that experts were pruned for; the
        random values are those of the random choices of experts.

    Raises:
        InputError: the model predicts no next token, the experts do not fit it, a corpus cannot
            be read, an argument is out of range, or a likelihood is not finite.
    """
    if random_sets < 1:
        raise InputError(f"random_sets must be at least 1, got {random_sets}")
    labels = list(experts.labels if labels is None else labels)
    if _UNPRUNED in labels:
        raise InputError(f"a label named {_UNPRUNED!r} stands for the unpruned model; rename it")
    generator = torch.Generator().manual_seed(seed)
    passes, pruned = [experts.members(torch.zeros_like(experts.chosen[0], dtype=torch.bool))], {}
    for label in labels:
        pruned[label] = pruned_experts(experts, label, rate, form)
        drawn = [random_experts_like(pruned[label], generator) for _ in range(random_sets)]
        passes += map(experts.members, [pruned[label], *drawn])
    passes = [neurons.bind(model) for neurons in passes]
    likelihood = TokenLikelihood(model)
    read = CorpusPass(model, corpora, tokenizer, seq_len, batch_size, max_tokens, False, **text)
    texts = {label: [inputs["input_ids"] for inputs in read.inputs(label)] for label in read.labels}
    with evaluating(model), tqdm(passes, "pruning", disable=not progress, delay=1) as bar:
        measured = torch.stack([_measure(model, likelihood, one, texts) for one in bar])
    unpruned, others = measured[:1], measured[1:].view(len(labels), 1 + random_sets, len(texts))
    least, largest = others[:, 1:].amin(1), others[:, 1:].amax(1)
    return PerplexityMatrix(
        rows=[_UNPRUNED, *labels],
        columns=list(texts),
        nll=torch.cat([unpruned, others[:, 0]]),
        random_nll=torch.cat([unpruned, others[:, 1:].mean(1)]),
        random_range=torch.stack(
            [torch.cat([unpruned, least]), torch.cat([unpruned, largest])], dim=-1
        ),
        tokens=[sum(rows[:, 1:].numel() for rows in batches) for batches in texts.values()],
        metadata={
            "model": experts.layout.model,
            "fingerprint": passes[0].fingerprint,
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
    )


def _measure(
    model: nn.Module,
    likelihood: TokenLikelihood,
    neurons: NeuronSet,
    texts: Mapping[str, list[Tensor]],
) -> Tensor:
    """Mean negative log-likelihood per text, float64 [texts], with the neurons deactivated."""
    means = []
    with steer(model, deactivate(neurons)) if neurons.total else nullcontext():
        for label, batches in texts.items():
            predicted = sum(rows[:, 1:].numel() for rows in batches)
            if not predicted:
                raise InputError(
                    f"label {label!r}: rows must have at least 2 tokens, since the first of a row "
                    "has no prediction, got 1"
                )
            means.append(sum(map(likelihood, batches)) / predicted)
            if not math.isfinite(means[-1]):
                raise InputError(
                    f"the likelihood of the text of label {label!r} is not finite (NaN or "
                    "infinite); check the model's weights or use a wider dtype"
                )
    return torch.tensor(means, dtype=torch.float64)
