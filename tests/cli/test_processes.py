"""The group of processes that a command under torchrun makes, and leaves."""

from __future__ import annotations

import sys

import pytest
from launch import torchrun

GROUP = """
import os
from lapefast.cli.processes import process_group

def threads():
    tasks = (f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task"))
    return [name for name in (open(task).read().strip() for task in tasks) if "gloo" in name]

with process_group() as group:
    import torch._dynamo  # as profiling does at some point
    import torch.distributed as dist

    dist.barrier()
    assert threads()
del group
print("left:", threads())
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="counts threads in /proc; running it on Linux lifts it"
)
def test_no_thread_of_the_group_outlives_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # each process would want a GPU of its own
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    run = torchrun(script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("left: []") == 2, run.stdout
