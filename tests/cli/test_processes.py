"""The group of processes that a command under torchrun makes, and leaves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GROUP = """
import os
from lapefast.cli.processes import process_group

with process_group() as group:
    import torch._dynamo  # as profiling does at some point
    import torch.distributed as dist

    dist.barrier()
del group
names = (open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task"))
print("left:", [name.strip() for name in names if "gloo" in name])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc, which Linux has")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*launched, "--nproc-per-node=2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("left: []") == 2, run.stdout
