"""The front end of an engine that counts: prompts with labels in, statistics out."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapefast.engines.vllm import ENVIRONMENT
from lapefast.engines.vllm.counting import LABEL
from lapefast.errors import InputError
from lapefast.neurons import Layout
from lapefast.recording.checks import check_flags

__all__ = ["Counted", "CountingEngine"]

_FIXED = {
    # Keys and values from a cache are never computed, and so not counted.
    "enable_prefix_caching": False,
    "worker_cls": "lapefast.engines.vllm.CountingWorker",
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
}
"""Options of vLLM that can't be other."""

_PATIENCE = 30.0
"""Seconds in which vLLM's processes may end by themselves."""


@dataclass(frozen=True)
class Counted:
    """What an engine counted.

    Attributes:
        tokens: int64 [labels].
        statistics: name -> site -> [labels, width].
        threads: of each worker.
    """

    tokens: Tensor
    statistics: dict[str, dict[str, Tensor]]
    threads: int


class CountingEngine:
    """vLLM with a model, counting at the tokens of prompts; a context manager.

    Args:
        model: a directory, or a name on the hub.
        layout: the model's sites, and their widths.
        labels: what prompts are grouped by.
        statistics: names of `lapefast.profiles.STATISTICS`.
        threshold: a neuron is active where its activation is strictly above it.
        longest: tokens of the longest prompt.
        options: vLLM's own, as its class `EngineArgs` takes them.

    Raises:
        InputError: vLLM is not there, an option does not go with counting, or edits are served.
        Exception: vLLM's own, where it does not start. What a worker in a process of its own
            refuses is in its log.
    """

    def __init__(
        self,
        model: str,
        layout: Layout,
        labels: Sequence[str],
        statistics: Sequence[str],
        threshold: float,
        longest: int,
        **options: Any,
    ) -> None:
        self._widths = {str(site): layout.widths[site] for site in layout.sites}
        _check_options(options)
        asked = {"labels": list(labels), "statistics": list(statistics), "threshold": threshold}
        options = {
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **options,
            **_FIXED,
            # A token is generated, though it is read by nobody.
            "max_model_len": longest + 1,
            "additional_config": {"lapefast": {**asked, "widths": self._widths}},
        }
        with _environment(VLLM_USE_V2_MODEL_RUNNER="0", VLLM_ALLOW_LONG_MAX_MODEL_LEN="1"):
            from vllm import SamplingParams

            self._engine = _start(model, options)
        self._params = {
            label: SamplingParams(max_tokens=1, detokenize=False, extra_args={LABEL: label})
            for label in labels
        }
        self.config = self._engine.vllm_config
        self._most, self._given = 2 * self.config.scheduler_config.max_num_seqs, 0

    def __enter__(self) -> CountingEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, label: str, rows: Tensor) -> None:
        """Give the engine prompts of one length, int64 [rows, length]; it may still be at work.

        No more of them wait than run at once.
        """
        for row in rows.tolist():
            prompt = {"type": "token", "prompt_token_ids": row}
            self._engine.add_request(str(self._given), prompt, self._params[label])
            self._given += 1
            while self._engine.get_num_unfinished_requests() > self._most:
                self._engine.step()

    def finish(self) -> Counted:
        """What was counted at all the prompts' tokens.

        Raises:
            InputError: an activation was not finite, naming the site.
        """
        while self._engine.has_unfinished_requests():
            self._engine.step()
        ranks = [
            torch.load(io.BytesIO(dump), weights_only=True)
            for dump in self._engine.collective_rpc("counted")
        ]
        statistics: dict[str, dict[str, Tensor]] = {}
        for site in self._widths:
            for name, whole in _joined(site, [rank["sites"][site] for rank in ranks]).items():
                statistics.setdefault(name, {})[site] = whole
        return Counted(ranks[0]["tokens"], statistics, ranks[0]["threads"])

    def close(self) -> None:
        """End vLLM's processes. Safe to repeat."""
        self._engine.engine_core.shutdown(timeout=_PATIENCE)


def _joined(site: str, held: Sequence[tuple[int, Tensor, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Name -> statistic [labels, width] of a site, of what each rank dumped of it."""
    check_flags(site, sum(flags for _, flags, _ in held))
    # Ranks hold neurons of their own, or all of them the same ones.
    parts = {start: tensors for start, _, tensors in held}
    return {
        name: torch.cat([parts[start][name] for start in sorted(parts)], dim=1)
        for name in held[0][2]
    }


def _start(model: str, options: dict[str, Any]) -> Any:
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        arguments = EngineArgs(model=model, **options)
    except TypeError as error:
        raise InputError(f"vLLM does not take these options: {error}") from error
    # Which chooses sizes of steps: those of offline use.
    return LLMEngine.from_engine_args(arguments, UsageContext.LLM_CLASS)


def _check_options(options: Mapping[str, Any]) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "vLLM is not installed in this environment; docs/serving.md says how it is"
        )
    if os.environ.get(ENVIRONMENT):
        raise InputError(
            f"{ENVIRONMENT} is set, so that vLLM would edit what is to be counted; unset it"
        )
    for name, value in _FIXED.items():
        if options.get(name, value) != value:
            raise InputError(
                f"{name} must be {value!r} where vLLM counts, so that every token of a prompt is "
                f"computed, and counted once; got {options[name]!r}"
            )
    for name in ("max_model_len", "additional_config"):
        if name in options:
            raise InputError(f"{name} can't be given where vLLM counts: lapefast sets it")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for as long as this lasts, as vLLM reads them from nowhere else."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
