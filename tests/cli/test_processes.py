"""The group of processes that a command under torchrun makes, and leaves."""

from __future__ import annotations

import sys

import pytest
from launch import torchrun

GROUP = """
import contextlib
import os
import time
from pathlib import Path

from lapefast.cli.processes import process_group

def threads():
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it may end meanwhile
            found += [name for name in (task / "comm").read_text().split() if "gloo" in name]
    return found

with process_group() as group:
    import torch._dynamo  # as profiling does at some point
    import torch.distributed as dist

    dist.barrier()
    assert threads()
del group
deadline = time.monotonic() + 10  # one that was joined can still be listed for a moment
while threads() and time.monotonic() < deadline:
    time.sleep(0.01)
assert not threads(), threads()
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
