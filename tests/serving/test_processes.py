"""Engines in processes of their own, as servers have them: several, compiled, tensor parallel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import asked

SCRIPT = Path(__file__).with_name("one_engine.py")


@pytest.fixture
def run(llama, tmp_path_factory):
    """Run one engine; what it printed and its exit status."""

    def run(asks, environment=None, task=None, **options):
        task = {"model": str(llama.path), "options": options, "asks": asks, **(task or {})}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), json.dumps(task)],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=250,
        )
        return done.stdout, done.returncode

    return run


def answered(output: str, status: int) -> list[list[int]]:
    assert status == 0, output
    # Processes that end may have the last word.
    return json.loads(re.search("^ANSWERS (.*)$", output, re.MULTILINE)[1])


SEVERAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def test_an_engine_and_its_worker_in_processes_of_their_own(llama, run):
    asks = asked(2, 70)
    got = answered(*run(asks, SEVERAL))
    assert got == [llama.expected(*ask) for ask in asks]


def test_two_ranks_that_hold_half_of_the_neurons_each(llama, run):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    asks = asked(2, 70)
    environment = {**SEVERAL, "VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    options = {"tensor_parallel_size": 2, "enforce_eager": False}
    got = answered(*run(asks, environment, **options))
    assert got == [llama.expected(*ask) for ask in asks]
    neurons = llama.edits["on"].tables["layers.0.mlp"][0]
    assert 0 < int((neurons < 96).sum()) < len(neurons)


def test_compiled_code_is_kept_apart_from_that_of_a_server_without_edits(
    llama, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    asks = asked(1, 70)
    unedited = [llama.expected(prompt, None) for prompt, _ in asks]
    edited = [llama.expected(*ask) for ask in asks]

    def compiled(environment=None, **task):
        return run(asks, environment, task, enforce_eager=False)

    assert answered(*compiled({"LAPEFAST_EDITS": ""})) == unedited
    # The code that is there now has no op for edits, and would be taken for this model's.
    output, status = compiled(load_compiled=True, one_compile_cache=True)
    assert "compiled code was loaded" in output
    assert status != 0
    assert "lapefast's op at layers.0.mlp must run once in a forward" in output
    # Kept apart, the server with edits compiles its own,
    output, status = compiled(load_compiled=True)
    assert "compiled code was loaded" not in output
    assert answered(output, status) == edited
    # loads it the next time,
    output, status = compiled(load_compiled=True)
    assert "compiled code was loaded" in output
    assert answered(output, status) == edited
    # and the other server its own.
    output, status = compiled({"LAPEFAST_EDITS": ""}, load_compiled=True)
    assert "compiled code was loaded" in output
    assert answered(output, status) == unedited


def test_a_model_that_vllm_takes_from_transformers(llama, run):
    """There the activation is a module by itself, and the model's own code multiplies."""
    asks = asked(2, 20)
    got = answered(*run(asks, model_impl="transformers"))
    assert got == [llama.expected(*ask) for ask in asks]


def test_a_plugin_that_vllm_does_not_load_is_noticed_by_the_worker_class(llama, run):
    absent = {"VLLM_PLUGINS": "lora_filesystem_resolver"}
    asks = asked(1, 10)
    output, status = run(asks, absent)
    assert status != 0
    assert "vLLM has not loaded the plugin lapefast" in output
    # Without that class nobody notices, and nothing is edited.
    unedited = [llama.expected(prompt, None) for prompt, _ in asks]
    assert answered(*run(asks, absent, worker_cls="auto")) == unedited
