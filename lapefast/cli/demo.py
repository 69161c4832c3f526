"""`lapefast demo`: the whole job on a small model, made on this machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapefast.cli.options import check_output
from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.demo import Demo

__all__ = ["demo"]

_SEQ_LEN = 128
_PROFILE_TOKENS = 2**13
_VALID_TOKENS = 5 * _SEQ_LEN
_BATCH_SIZE = 8
_PROMPTS = 2
_NEW_TOKENS = 12
# Of so small a model; the papers' numbers are of models a thousand times as large.
_DOCUMENTS = 48
_PLND = {"ffn": 256, "query_key": 24, "value": 24}
_UNITS = 100
_EXPERTS = 16
_PRUNED = 0.2
_SAMPLES = 12
_EXAMPLES = 24
# Of what takes many runs to measure: examples that are answered, and languages.
_ANSWERED = 3
_FEW = ("en", "zh", "ja")
_FILES = {
    "lape": "neurons.json",
    "profile": "profile.safetensors",
    "matrix": "matrix.json",
    "sweep": "sweep.jsonl",
    "sampled": "sampled.json",
    "average-precision in full": "average-precision.safetensors",
    "experts in full": "experts.safetensors",
    "pruning": "pruning.json",
    "sharing in full": "sharing.json",
    "deactivation": "categories.json",
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
    # Read when torch loads GNU's OpenMP. Between the small matrices of this model, threads that
    # sleep at once make training 1.6 times as long on idle cores; threads that spin for as long as
    # they do by default make it several times as long where another program wants the same cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    import torch

    import lapefast as lf
    from lapefast.cli.tables import console, show
    from lapefast.demo import TOP_RATE, load, prompts
    from lapefast.report import Inputs, write_report

    torch.set_num_threads(threads)
    console.print("The demo model: a small Llama of seven languages, trained here once")
    made = load()
    copied = _copy(made.directory, output / "model")
    # What is written names the model as it is found beside it.
    made.model.config._name_or_path = made.tokenizer.name_or_path = copied.name
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

    lines = [
        {"label": label, "prompt": prompt}
        for label, some in prompts(_PROMPTS).items()
        for prompt in some
    ]
    sweep = lf.evaluate.sweep(
        made.model,
        neurons,
        profile,
        _write_lines(output / "prompts.jsonl", lines),
        made.tokenizer,
        max_new_tokens=_NEW_TOKENS,
    )
    sweep.save(output / "sweep.jsonl")
    others, results = _other_methods(made, valid, output)
    for name, found in others.items():
        found.save(output / f"{name}.neurons.json")
    for name, result in results.items():
        result.save(output / _FILES[name])
    measured = {name.removesuffix(" in full"): result for name, result in results.items()}
    files = _FILES | {name: f"{name}.neurons.json" for name in others}
    report = output / "report.html"
    write_report(
        report,
        Inputs(profile, {"lape": neurons, **others}, matrix, sweep, files=files, **measured),
        title="Language-specific neurons of the demo model",
        figures=output / "figures",
    )
    console.print(
        f"wrote model, corpus, profile, neurons, every method's results, figures and the report to "
        f"{output}; look at {report}"
    )


def _other_methods(made: Demo, texts: dict[str, Path], output: Path) -> tuple[dict, dict]:
    """PLND, average precision, sharing and experts: their neurons, and results as in `_FILES`."""
    import lapefast as lf
    from lapefast.demo import examples

    model, tokenizer = made.model, made.tokenizer
    plnd = lf.detect.plnd(
        model, tokenizer, texts, top=_PLND, seq_len=_SEQ_LEN, max_documents=_DOCUMENTS
    )
    precise = lf.detect.average_precision(
        model, tokenizer, texts, top=_UNITS, bottom=_UNITS, max_documents=_DOCUMENTS
    )
    precise.save(details := output / _FILES["average-precision in full"])
    few = lf.detect.AveragePrecisionNeurons.load(details, _FEW)
    sampled = lf.evaluate.sampled_languages(
        model, tokenizer, few, samples=_SAMPLES, max_new_tokens=_NEW_TOKENS, restrict=True
    )
    parallel = _write_lines(output / "examples.jsonl", examples(_EXAMPLES))
    sharing = lf.detect.sharing(model, tokenizer, parallel)
    answered = _write_lines(output / "few-examples.jsonl", examples(_EXAMPLES)[:_ANSWERED])
    deactivation = lf.evaluate.category_deactivation(model, tokenizer, answered)
    experts = lf.detect.experts(
        model, texts, tokenizer, _EXPERTS, seq_len=_SEQ_LEN, max_documents=_DOCUMENTS
    )
    pruning = lf.evaluate.pruning_matrix(
        model,
        experts,
        texts,
        tokenizer,
        _PRUNED,
        "frequency",
        _FEW,
        seq_len=_SEQ_LEN,
        max_tokens=2 * _SEQ_LEN,
    )
    sets = {
        "plnd": plnd,
        "average-precision": precise,
        "sharing": sharing.neurons,
        "experts": experts.neuron_sets(only=True),
    }
    results = {
        "sampled": sampled,
        "sharing in full": sharing,
        "deactivation": deactivation,
        "experts in full": experts,
        "pruning": pruning,
    }
    return sets, results


def _write_lines(path: Path, lines: list[dict]) -> Path:
    """JSON lines; the path."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, "utf-8", newline="\n")
    return path


def _copy(source: Path, target: Path) -> Path:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
