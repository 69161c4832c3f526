"""The worker: ops placed in a loaded model, and whose rows each of its forwards has.

vLLM joins the tokens of all requests of a step in one tensor: those of a request lie together, be
they a prompt, a part of one, or the newest token. The model runner knows where each request starts.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lapefast import __version__
from lapefast.engines.vllm.placement import FFN, find, matched
from lapefast.engines.vllm.rows import Rows
from lapefast.errors import InputError
from lapefast.neurons import Layout

__all__ = ["Task", "compile_factor", "load"]


class Task(ABC):
    """What a worker does at every FFN of its model.

    Attributes:
        what: its name in messages, in the plural.
        layout: the sites at which it is done, and their widths.
    """

    what: str
    layout: Layout

    @abstractmethod
    def placed(self, site: str, ffn: FFN, rows: Rows, number: int) -> nn.Module:
        """What takes the place of the activation of FFN `number`, which is that of `site`."""

    @abstractmethod
    def index(self, runner: Any) -> Tensor:
        """Whose each row of the step is that a V1 model runner has prepared: int32 [rows]."""


def load(worker: Any, original: Callable[[], None], task: Task) -> Rows:
    """Load the model as the worker does, with the task placed before it is compiled.

    Returns:
        What the FFNs share. The op of FFN i is that of site i of the task's layout.

    Raises:
        InputError: the model's FFNs are not the sites of the task, or can't be handled.
    """
    _refuse_unknown(worker)
    _separate_compile_cache(worker.vllm_config, task.layout)
    original()
    runner = worker.model_runner
    rows = _place(runner.get_model(), task, runner.max_num_tokens, runner.device)
    runner._model_forward = functools.partial(_forward, runner, runner._model_forward, task, rows)
    return rows


def compile_factor(layout: Layout) -> str:
    """What code compiled with ops at these sites depends on, beside what vLLM knows of."""
    sites = "".join(f"{site}|{layout.widths[site]}\n" for site in layout.sites)
    return f"{__version__} {hashlib.sha256(sites.encode()).hexdigest()}"


def _place(model: nn.Module, task: Task, capacity: int, device: torch.device) -> Rows:
    ffns = matched(find(model), task.layout, task.what)
    rows = Rows(capacity, len(ffns), device)
    for number, (site, ffn) in enumerate(ffns.items()):
        setattr(ffn.owner, ffn.name, task.placed(site, ffn, rows, number))
    return rows


def _forward(
    runner: Any,
    original: Any,
    task: Task,
    rows: Rows,
    input_ids: Tensor | None = None,
    positions: Tensor | None = None,
    intermediate_tensors: Any = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """A real forward (warm-up and dummy ones don't come this way): it fires, or it fails."""
    given = inputs_embeds if input_ids is None else input_ids
    rows.begin(task.index(runner))
    try:
        output = original(
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
    finally:
        rows.end()
    rows.check(given.shape[0], task.layout.sites)
    return output


def _separate_compile_cache(config: Any, layout: Layout) -> None:
    """Make code compiled with these sites another entry of vLLM's cache than any other."""
    other = config.additional_config
    if other and not isinstance(other, dict):
        raise InputError(
            "the plugin needs additional_config to be a dictionary, to keep compiled code apart; "
            f"it is of the class {type(other).__name__}"
        )
    config.additional_config = {**(other or {}), "lapefast": compile_factor(layout)}


def _refuse_unknown(worker: Any) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = worker.model_runner
    if not isinstance(runner, GPUModelRunner):
        cls = type(runner)
        raise InputError(
            "lapefast works in vLLM's V1 model runner, but this worker has "
            f"{cls.__module__}.{cls.__name__}; set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    parallel = worker.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise InputError(
            "lapefast does not work under pipeline parallelism; use tensor parallelism "
            "(--tensor-parallel-size)"
        )
    if parallel.use_ubatching:
        raise InputError("lapefast does not work under dual-batch overlap; leave it off")
    if worker.model_config.is_encoder_decoder:
        raise InputError("lapefast does not work in vLLM's encoder-decoder models")
