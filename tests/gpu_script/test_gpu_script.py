"""`make gpu` starts on a machine that has no more than tests/gpu.sh says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONLY = "torch triton transformers pybind11 cmake ninja pytest pytest-benchmark"

# In place of the interpreter: installs nothing, and collects the tests that are to run.
PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m pip") ;;
    "-m pytest") exec "{python}" "$@" --collect-only ;;
    *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def bare():
    """The environment of a Python that hides all other libraries."""
    hiding = Path(__file__).with_name("bare")
    paths = [hiding, ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {name: os.environ[name] for name in os.environ if name != "PYTEST_ADDOPTS"}
    return environment | {
        "LAPEFAST_ONLY": ONLY,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }


@pytest.mark.long
def test_every_test_and_benchmark_is_collected_with_those_libraries_alone(bare, tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", "tests/gpu.sh"], cwd=ROOT, env=bare | {"PYTHON": str(python)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("bench_ops", "bench_scaling", "test_op_every_half", "test_on_device"):
        assert f"{name}.py::" in done.stdout
    assert "ERROR" not in done.stdout


PROFILED = """
import importlib.util, torch, transformers, lapefast as lf
hidden = "psutil", "babel", "pandas", "datasets", "sklearn"
assert not [name for name in hidden if importlib.util.find_spec(name)]
config = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
)
model = transformers.LlamaForCausalLM(config)
profile = lf.profile(model, {"en": [[1, 2, 3, 4] * 8]}, seq_len=8, batch_size=2, progress=False)
print(profile.tokens.tolist())
"""


def test_a_pass_needs_those_libraries_alone(bare):
    done = subprocess.run(
        [sys.executable, "-c", PROFILED], env=bare, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[32]", done.stderr
