"""Starting the processes that share a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(*command: object) -> subprocess.CompletedProcess:
    """Run a script, or ``-m`` and a module, in two processes that know of each other."""
    paths = [Path(__file__).parents[2], Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    # Standalone: on a port that is free.
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, command)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=240,
    )
