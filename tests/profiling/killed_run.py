"""Starts a resumable run again and again and kills each at a random moment, until one ends.

    python killed_run.py DIRECTORY ROWS SEED

Prints how many were killed. The profile is DIRECTORY/profile.safetensors, the state DIRECTORY/run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import run_inputs
import torch

import lapefast as lf

_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def run(model: torch.nn.Module, directory: Path, rows: int) -> None:
    profile = lf.profile(
        model,
        run_inputs.corpora(rows),
        batch_size=2,
        progress=False,
        resume=directory / "run",
        save_every=0,
    )
    profile.save(directory / "profile.safetensors")


def _wait_for_saves(directory: Path, wanted: int, child: int) -> None:
    """Until the run has saved its state so often, by the files that come and go; or has ended."""
    seen = {_states(directory)}
    while len(seen) <= wanted and os.waitid(os.P_PID, child, _LOOK) is None:
        seen.add(_states(directory))


def _states(directory: Path) -> tuple[int, ...]:
    try:
        return tuple(one.stat().st_ino for one in sorted(directory.glob("state-?.safetensors")))
    except OSError:
        return ()


def main(directory: Path, rows: int, seed: int) -> None:
    torch.set_num_threads(1)
    model = run_inputs.model()
    moments = random.Random(seed)
    killed = 0
    while True:
        # Forked before anything has started a thread.
        child = os.fork()
        if child == 0:
            run(model, directory, rows)
            os._exit(0)
        _wait_for_saves(directory / "run", moments.randrange(5), child)
        time.sleep(moments.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it had ended before
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
