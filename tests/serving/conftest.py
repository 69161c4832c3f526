"""Serving by vLLM, which has an environment of its own: `make test-vllm`.

Engines run in the tests' own process, one at a time in each, unless a test is about several
processes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # vLLM reads these when it is imported.
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
        VLLM_USE_V2_MODEL_RUNNER="0",
    )

# `engines.py` and `tiny.py` are imported as modules of their own.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny random Llama with named edits, and the edit file that every engine here serves."""
    import tiny
    from vllm.plugins import load_general_plugins

    made = tiny.llama(tmp_path_factory.mktemp("llama"))
    os.environ["LAPEFAST_EDITS"] = str(made.edit_file)
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("vllm-cache"))
    # vLLM does this once in a process: before a test takes the edit file away.
    load_general_plugins()
    return made
