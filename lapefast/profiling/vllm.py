"""The pass over a corpus by vLLM: rows as prompts, statistics from its workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

import lapefast
from lapefast.engines.vllm.checkpoint import checkpoint_fingerprint, empty_model
from lapefast.engines.vllm.engine import CountingEngine
from lapefast.errors import InputError
from lapefast.models import find_sites
from lapefast.neurons import Layout
from lapefast.profiles import Profile
from lapefast.profiling.batches import CorpusPass
from lapefast.recording.checks import check_statistics, check_threshold

__all__ = ["profile"]

_log = logging.getLogger(__name__)


def profile(
    model: str,
    corpora: Mapping[str, Any],
    tokenizer: Any = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    threshold: float = 0.0,
    statistics: Sequence[str] = ("counts", "sums"),
    tensor_parallel_size: int = 1,
    progress: bool = True,
    *,
    document: str = "line",
    field: str = "text",
    special_tokens: bool = True,
    token_cache: str | os.PathLike[str] | None = None,
    **engine_options: Any,
) -> Profile:
    """Count as `lapefast.profile` does, with vLLM running the model.

    Counts are exact for what vLLM itself computes, which is the model in another order of additions
    than transformers': a comparison here and there falls on the other side of the threshold, and
    the profile says which engine it is of.

    Args:
        model: a directory that `save_pretrained` wrote, or a name on the hub.
        corpora, tokenizer, seq_len, max_tokens, threshold, statistics, progress, document, field,
            special_tokens, token_cache: as `lapefast.profile` takes them. ``square_sums`` and
            ``up_abs_sums`` need an activation that multiplies too, as those of gated FFNs do in
            vLLM; there are no ``shard_counts``.
        batch_size: rows that run at once, vLLM's ``max_num_seqs``; None is vLLM's own.
        tensor_parallel_size: how many workers share each FFN's neurons.
        engine_options: vLLM's own, as its class ``EngineArgs`` takes them, such as ``dtype``,
            ``revision``, ``max_num_batched_tokens`` or ``gpu_memory_utilization``.

    Raises:
        InputError: for what is wrong with the model, the corpora or the arguments, or where vLLM
            is not installed; for activations that are not finite, and where vLLM did not compute
            every token of the corpora once.
        Exception: vLLM's own, where its processes do not start; its log has the reason.
    """
    names, threshold = check_statistics(statistics), check_threshold(threshold)
    if "shard_counts" in names:
        raise InputError("vLLM's workers do not count shards; leave shard_counts out")
    origin = engine_options.get("revision"), engine_options.get("trust_remote_code", False)
    empty = _empty(model, *origin)
    text = CorpusPass(
        empty, corpora, tokenizer, seq_len, batch_size, max_tokens, progress,
        document=document, field=field, special_tokens=special_tokens, token_cache=token_cache,
    )  # fmt: skip
    sites = find_sites(empty)
    for site in sites:
        if site.experts:
            raise InputError(
                f"{site.name} is a mixture of experts, which vLLM computes where it can't be "
                "counted; use the engine transformers"
            )
    layout = Layout(
        tuple(site.name for site in sites), {site.name: site.width for site in sites}, None, model
    )
    if batch_size is not None:
        engine_options["max_num_seqs"] = batch_size
    with CountingEngine(
        model, layout, text.labels, names, threshold, text.longest,
        tensor_parallel_size=tensor_parallel_size, **engine_options,
    ) as engine:  # fmt: skip
        _log.warning(
            "vLLM adds up in another order than transformers does: a comparison here and there may "
            "differ from transformers' profile of the same text"
        )
        for label in text.labels:
            for batch in text.batches(label):
                engine.read(label, batch.ids)
        counted = engine.finish()
        config = engine.config
    about = text.metadata()
    given = [corpus["tokens"] for corpus in about["corpora"]]
    if counted.tokens.tolist() != given:
        raise InputError(
            f"vLLM computed {counted.tokens.tolist()} tokens of {', '.join(text.labels)}, where "
            f"the text has {given}; leave out options that take keys and values from elsewhere"
        )
    metadata = {
        "model": model,
        "architecture": type(empty).__name__,
        "fingerprint": checkpoint_fingerprint(config.model_config),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "threshold": threshold,
        "exact": True,
        "edited": False,
        "engine": {
            "name": "vllm",
            "tensor_parallel_size": tensor_parallel_size,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        },
        "threads": counted.threads,
        "versions": {
            "lapefast": lapefast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vllm": _version(),
        },
        "tokenizer": getattr(tokenizer, "name_or_path", None),
        **about,
        "batch_size": config.scheduler_config.max_num_seqs,
    }
    return Profile(text.labels, sites, {"decoder": counted.tokens}, counted.statistics, metadata)


def _empty(model: str, revision: str | None, trust_remote_code: bool) -> torch.nn.Module:
    if not isinstance(model, str):
        raise InputError(
            f"vLLM loads the model itself: give its directory or name, got {type(model).__name__}"
        )
    try:
        return empty_model(model, revision, trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # transformers and the hub each raise their own
        raise InputError(
            f"transformers makes no causal model of {model}, by which vLLM's could be counted: "
            f"{error}"
        ) from error


def _version() -> str:
    import vllm

    return vllm.__version__
