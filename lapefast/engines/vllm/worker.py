"""Worker classes: the platform's own, which serve edits or don't start, or which count."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from lapefast.engines.vllm import ENVIRONMENT
from lapefast.engines.vllm.counting import Counting
from lapefast.engines.vllm.served import served_here
from lapefast.errors import InputError
from lapefast.neurons import Layout

__all__ = ["counting_worker_class", "serving_worker_class"]


@functools.cache
def serving_worker_class() -> type:
    """The platform's worker, refusing to start where the plugin is not active."""

    class Worker(_platform_worker()):
        def __init__(self, *args, **kwargs):
            _require()
            super().__init__(*args, **kwargs)

    return _named(Worker)


@functools.cache
def counting_worker_class() -> type:
    """The platform's worker, counting at every FFN what `additional_config["lapefast"]` says."""
    from lapefast.engines.vllm.runner import load

    class CountingWorker(_platform_worker()):
        def load_model(self, *args, **kwargs):
            self._counting = _counting(**self.vllm_config.additional_config["lapefast"])
            load(self, functools.partial(super().load_model, *args, **kwargs), self._counting)

        def counted(self) -> bytes:
            return self._counting.dump()

    return _named(CountingWorker)


def _counting(widths: dict[str, int], **asked: Any) -> Counting:
    return Counting(Layout(tuple(widths), widths), **asked)


def _platform_worker() -> type:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        path = "vllm.v1.worker.cpu_worker.CPUWorker"
    elif current_platform.is_xpu():
        path = "vllm.v1.worker.xpu_worker.XPUWorker"
    else:
        path = "vllm.v1.worker.gpu_worker.Worker"
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _named(worker: type) -> type:
    """The class under the name by which vLLM asks for it."""
    worker.__module__, worker.__qualname__ = "lapefast.engines.vllm", worker.__name__
    return worker


def _require() -> None:
    from lapefast.engines.vllm.edits import installed

    if served_here() is None:
        raise InputError(
            f"the worker class lapefast.engines.vllm.Worker serves edits, but {ENVIRONMENT} is "
            "not set in its process; set it to an edit file"
        )
    if not installed():
        raise InputError(
            "the worker class lapefast.engines.vllm.Worker serves edits, but vLLM has not loaded "
            "the plugin lapefast: VLLM_PLUGINS must be unset or name it, and lapefast must be "
            "installed, not only importable"
        )
