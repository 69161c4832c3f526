"""The worker: edits placed in a loaded model, and whose rows each of its forwards has.

vLLM joins the tokens of all requests of a step in one tensor: those of a request lie together, be
they a prompt, a part of one, or the newest token. The model runner knows where each request starts.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapefast.engines.vllm import placement
from lapefast.engines.vllm.checkpoint import check_fingerprint
from lapefast.engines.vllm.served import Served, served_here
from lapefast.errors import InputError

__all__ = ["install", "installed", "row_sets"]

_MARK = "_lapefast_edits"


def installed() -> bool:
    """Whether workers made in this process serve edits."""
    from vllm.v1.worker.worker_base import WorkerBase

    return hasattr(WorkerBase, _MARK)


def install() -> None:
    """Place edits in the model of every worker made from here on. Safe to repeat."""
    from vllm.v1.worker.worker_base import WorkerBase

    if installed():
        return
    setattr(WorkerBase, _MARK, None)
    original = WorkerBase.__init__

    @functools.wraps(original)
    def construct(self, *args, **kwargs):
        original(self, *args, **kwargs)
        served = served_here()
        if served is not None:
            # On the instance: platforms have workers, and so ways to load a model, of their own.
            self.load_model = functools.partial(_load, self, self.load_model, served)

    WorkerBase.__init__ = construct


def row_sets(runner: Any, served: Served) -> Tensor:
    """The set of each row of the step that a V1 model runner has prepared: int32 [rows]."""
    requests = runner.input_batch.req_ids
    sets = [served.set_of(_extra_args(runner.requests[name])) for name in requests]
    lengths = np.diff(runner.query_start_loc.np[: len(requests) + 1])
    return torch.from_numpy(np.repeat(np.array(sets, dtype=np.int32), lengths))


def _load(worker: Any, original: Any, served: Served, *args: Any, **kwargs: Any) -> None:
    """Load the model as the worker does, with the edits placed before it is compiled."""
    _refuse_unknown(worker)
    _separate_compile_cache(worker.vllm_config, served)
    original(*args, **kwargs)
    runner = worker.model_runner
    check_fingerprint(worker.model_config, served)
    rows = placement.place(runner.get_model(), served, runner.max_num_tokens, runner.device)
    runner._model_forward = functools.partial(_forward, runner, runner._model_forward, served, rows)
    setattr(runner, _MARK, rows)


def _forward(
    runner: Any,
    original: Any,
    served: Served,
    rows: Any,
    input_ids: Tensor | None = None,
    positions: Tensor | None = None,
    intermediate_tensors: Any = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """A real forward (warm-up and dummy ones don't come this way): it fires, or it fails."""
    given = inputs_embeds if input_ids is None else input_ids
    rows.begin(row_sets(runner, served))
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
    rows.check(given.shape[0], served.layout.sites)
    return output


def _extra_args(request: Any) -> dict[str, Any] | None:
    return getattr(request.sampling_params, "extra_args", None)


def _separate_compile_cache(config: Any, served: Served) -> None:
    """Make code compiled with these sites another entry of vLLM's cache than any other."""
    other = config.additional_config
    if other and not isinstance(other, dict):
        raise InputError(
            "the plugin needs additional_config to be a dictionary, to keep compiled code apart; "
            f"it is of the class {type(other).__name__}"
        )
    config.additional_config = {**(other or {}), "lapefast": served.compile_factor}


def _refuse_unknown(worker: Any) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = worker.model_runner
    if not isinstance(runner, GPUModelRunner):
        cls = type(runner)
        raise InputError(
            "edits are served by vLLM's V1 model runner, but this worker has "
            f"{cls.__module__}.{cls.__name__}; set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    parallel = worker.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise InputError(
            "edits are not served under pipeline parallelism; use tensor parallelism "
            "(--tensor-parallel-size)"
        )
    if parallel.use_ubatching:
        raise InputError("edits are not served under dual-batch overlap; leave it off")
    if worker.model_config.is_encoder_decoder:
        raise InputError("edits are not served in encoder-decoder models")
