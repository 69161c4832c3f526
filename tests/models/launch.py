"""Starting the processes that share a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_SECONDS = 200


def torchrun(*command: object) -> subprocess.CompletedProcess:
    """Run a script, or ``-m`` and a module, in two processes that know of each other."""
    paths = [Path(__file__).parents[2], Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    # Standalone: on a port that is free.
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    started = subprocess.Popen(
        [sys.executable, "-m", *launcher, *map(str, command)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = started.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        # A signal that the launcher passes on: killed, it would leave its processes behind.
        started.send_signal(signal.SIGTERM)
        out, err = started.communicate()
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)
