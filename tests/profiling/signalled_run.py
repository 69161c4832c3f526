"""A resumable run that says when it has saved something, for a test that sends it a signal.

python signalled_run.py DIRECTORY
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import run_inputs
import torch

import lapefast as lf
from lapefast.errors import RunStopped
from lapefast.profiling.state import RunDirectory


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    save = RunDirectory.save

    def saying(self, *given) -> None:
        save(self, *given)
        print("saved", flush=True)
        time.sleep(0.02)

    RunDirectory.save = saying
    try:
        lf.profile(
            run_inputs.model(),
            run_inputs.corpora(60),
            batch_size=2,
            progress=False,
            resume=directory / "run",
            save_every=0,
        ).save(directory / "profile.safetensors")
    except RunStopped as error:
        print(error, flush=True)
        sys.exit(128 + error.signal)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
