"""`torchrun -m lapefast profile`, and what ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from lapefast import Profile


def command(made, output: Path, *options: object, processes: int = 2) -> list[str]:
    launched = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    corpora = [f"--corpus={language}={path}" for language, path in made.train.items()]
    given = (
        *(*launched, "--nproc-per-node", processes, "-m", "lapefast", "profile"),
        *(made.directory, *corpora, "--batch-size", 1, "--threads", 1),
        *("-o", output, *options),
    )
    return [str(one) for one in given]


def started(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment, **pipes)


def wait_for_state(directory: Path, run: subprocess.Popen, saves: int = 3) -> None:
    """Until the run has saved some states."""
    seen = set()
    while len(seen) < saves:
        assert run.poll() is None, run.stderr.read()
        seen |= {one.stat().st_ino for one in directory.glob("state-?.safetensors")}
        time.sleep(0.002)


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory) -> Profile:
    """Of one process."""
    output = tmp_path_factory.mktemp("alone") / "profile.safetensors"
    arguments = command(made, output)
    run = started([sys.executable, *arguments[arguments.index("-m", 3) :]])
    assert run.wait() == 0, run.stderr.read()
    return Profile.load(output)


def assert_same(output: Path, alone: Profile) -> None:
    profile = Profile.load(output)
    assert torch.equal(profile.tokens, alone.tokens)
    for site, counts in alone.counts.items():
        assert torch.equal(profile.counts[site], counts)


@pytest.mark.long
def test_two_processes_are_told_to_stop_then_one_is_killed_then_they_end(made, alone, tmp_path):
    output, directory = tmp_path / "profile.safetensors", tmp_path / "run"
    arguments = command(made, output, "--resume", directory, "--save-every", 0)

    run = started(arguments)
    wait_for_state(directory, run)
    begin = time.monotonic()
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode != 0
    assert re.search(r"stopped by SIGTERM; [\d,]+ tokens are counted and saved in .*run", said)
    assert time.monotonic() - begin < 60
    assert not output.exists()

    run = started(arguments)
    wait_for_state(directory, run)
    workers = [
        one for one in psutil.Process(run.pid).children() if "profile" in " ".join(one.cmdline())
    ]
    assert len(workers) == 2
    workers[1].kill()
    _, said = run.communicate()
    assert run.returncode != 0
    assert "SIGKILL" in said
    assert not output.exists()

    run = started(arguments)
    out, said = run.communicate()
    assert run.returncode == 0, said
    assert out.count("wrote ") == 1
    assert_same(output, alone)


@pytest.mark.long
def test_bad_input_is_said_once(made, tmp_path):
    run = started(command(made, tmp_path / "p", "--resume", "/nowhere/at/all"))
    _, said = run.communicate()
    assert run.returncode != 0
    assert said.count("error: the state of a run can't be saved in /nowhere/at/all") == 1
