"""`lapefast demo`: the main job on a small model, made on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from lapefast.cli.options import check_output
from lapefast.errors import InputError

__all__ = ["demo"]

_SEQ_LEN = 128
_PROFILE_TOKENS = 2**14
_VALID_TOKENS = 1280
_BATCH_SIZE = 8


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIRECTORY", help="Where to write.")
    ] = Path("demo-output"),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Profile a small model of seven languages, find their neurons, and deactivate them.

    The model is trained on this machine, once, in about a minute; nothing is downloaded.

    Example: `lapefast demo -o demo-output`
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}; give a directory") from error
    check_output(output / "profile.safetensors")
    # Read when torch loads OpenMP. Threads that spin while they wait make work of small matrices
    # several times slower wherever another program wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    import lapefast as lf
    from lapefast.cli.tables import console, show
    from lapefast.demo import TOP_RATE, load
    from lapefast.report import draw_matrix, draw_neurons

    torch.set_num_threads(threads)
    console.print("The demo model: a small Llama of seven languages, trained here once")
    made = load()
    _copy(made.directory, output / "model")
    train = {
        label: _copy(path, output / "corpus" / path.name) for label, path in made.train.items()
    }
    valid = {
        label: _copy(path, output / "corpus" / path.name) for label, path in made.valid.items()
    }

    profile = lf.profile(
        made.model,
        train,
        made.tokenizer,
        seq_len=_SEQ_LEN,
        batch_size=_BATCH_SIZE,
        max_tokens=_PROFILE_TOKENS,
    )
    profile.save(output / "profile.safetensors")
    show(profile)

    neurons = lf.detect.lape(profile, top_rate=TOP_RATE)
    neurons.save(output / "neurons.json")
    show(neurons)
    console.print(
        f"LAPE with top_rate={TOP_RATE}: of so small a model the published 0.01 would leave "
        "too few neurons for seven languages"
    )

    matrix = lf.evaluate.perplexity_matrix(
        made.model,
        neurons,
        valid,
        made.tokenizer,
        seq_len=_SEQ_LEN,
        batch_size=_BATCH_SIZE,
        max_tokens=_VALID_TOKENS,
    )
    matrix.save(output / "matrix.json")
    show(matrix)
    draw_neurons(neurons, output / "neurons.png")
    draw_matrix(matrix, output / "matrix.png")
    console.print(f"wrote model, corpus, profile, neurons, matrix and figures to {output}")


def _copy(source: Path, target: Path) -> Path:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
