"""`lapefast demo`: the whole job on a small model, made on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapefast.cli.options import check_output
from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.demo import Demo
    from lapefast.detect import Experts, Sharing

__all__ = ["demo"]

_SEQ_LEN = 128
_PROFILE_TOKENS = 2**14
_VALID_TOKENS = 1280
_BATCH_SIZE = 8
_PROMPTS = 2
_NEW_TOKENS = 16
# Of so small a model; the papers' numbers are of models a thousand times as large.
_DOCUMENTS = 200
_PLND = {"ffn": 256, "query_key": 24, "value": 24}
_UNITS = 100
_EXPERTS = 16
_FILES = {
    "lape": "neurons.json",
    "profile": "profile.safetensors",
    "matrix": "matrix.json",
    "sweep": "sweep.jsonl",
    "experts in full": "experts.safetensors",
    "sharing in full": "sharing.json",
}


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIRECTORY", help="Where to write.")
    ] = Path("demo-output"),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Run the field's five methods on a small model of seven languages, and report.

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
    from lapefast.demo import TOP_RATE, load, prompts
    from lapefast.report import Inputs, write_report

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

    sweep = lf.evaluate.sweep(
        made.model,
        neurons,
        profile,
        prompts(_PROMPTS),
        made.tokenizer,
        max_new_tokens=_NEW_TOKENS,
    )
    sweep.save(output / "sweep.jsonl")
    others, experts, sharing = _other_methods(made, valid)
    for name, found in others.items():
        found.save(output / f"{name}.neurons.json")
    experts.save(output / "experts.safetensors")
    sharing.save(output / "sharing.json")

    report = output / "report.html"
    write_report(
        report,
        Inputs(
            profile,
            {"lape": neurons, **others},
            matrix,
            sweep.summary(),
            experts,
            sharing,
            _FILES | {name: f"{name}.neurons.json" for name in others},
        ),
        figures=output / "figures",
    )
    console.print(
        f"wrote model, corpus, profile, neurons, matrix, sweep, figures and the report to {output};"
        f" look at {report}"
    )


def _other_methods(made: Demo, texts: dict[str, Path]) -> tuple[dict, Experts, Sharing]:
    """PLND, average precision, sharing and experts: the neurons by method, and the last two."""
    import lapefast as lf
    from lapefast.demo import examples

    model, tokenizer = made.model, made.tokenizer
    plnd = lf.detect.plnd(
        model, tokenizer, texts, top=_PLND, seq_len=_SEQ_LEN, max_documents=_DOCUMENTS
    )
    precise = lf.detect.average_precision(
        model, tokenizer, texts, top=_UNITS, bottom=_UNITS, max_documents=_DOCUMENTS
    )
    sharing = lf.detect.sharing(model, tokenizer, examples())
    experts = lf.detect.experts(
        model, texts, tokenizer, _EXPERTS, seq_len=_SEQ_LEN, max_documents=_DOCUMENTS
    )
    sets = {
        "plnd": plnd,
        "average-precision": lf.NeuronSets(precise, precise.layout, precise.metadata),
        "sharing": sharing.neurons,
        "experts": experts.neuron_sets(only=True),
    }
    return sets, experts, sharing


def _copy(source: Path, target: Path) -> Path:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
