"""A worker class that does not start unless it serves edits."""

from __future__ import annotations

import functools
import importlib

from lapefast.engines.vllm import ENVIRONMENT
from lapefast.engines.vllm.served import served_here
from lapefast.errors import InputError

__all__ = ["worker_class"]


@functools.cache
def worker_class() -> type:
    """The platform's worker, refusing to start where the plugin is not active."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        path = "vllm.v1.worker.cpu_worker.CPUWorker"
    elif current_platform.is_xpu():
        path = "vllm.v1.worker.xpu_worker.XPUWorker"
    else:
        path = "vllm.v1.worker.gpu_worker.Worker"
    module, _, name = path.rpartition(".")
    base = getattr(importlib.import_module(module), name)

    class Worker(base):
        def __init__(self, *args, **kwargs):
            _require()
            super().__init__(*args, **kwargs)

    Worker.__module__, Worker.__qualname__ = "lapefast.engines.vllm", "Worker"
    return Worker


def _require() -> None:
    from lapefast.engines.vllm.runner import installed

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
