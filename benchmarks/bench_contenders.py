"""The whole pass beside every other way to count: one model, one run."""

from __future__ import annotations

import importlib.util

import torch
from baselines import Contender
from baselines.hook import hook, hooked
from baselines.published import published
from models import Llama, assert_equal_counts, profiling

# How many times as long as lapefast's pass the others must take.
_BARS = {
    "cpu": {"the published forward": 2.0, "the unpatched model": 1.6, "nnsight": 1.9},
    "cuda": {"the published forward": 1.25, "the unpatched model": 1.08},
}


def test_whole_pass(llama, contest, report, device):
    others = {
        "the published forward": published(llama.copy()),
        "a forward hook": hook(llama.copy()),
    }
    for name, package, enter in (
        ("nnsight", "nnsight", _nnsight),
        ("TransformerLens", "transformer_lens", _transformer_lens),
    ):
        if importlib.util.find_spec(package) is None:
            report.note(f"{llama.what}: {name}", "not installed (the extra `bench` has it)")
        else:
            others[name] = enter(llama)

    with torch.no_grad(), profiling(llama.copy(), "counts") as ours:

        def check():
            counted, ids = {"lapefast": ours} | others, llama.ids[0]
            for contender in counted.values():
                contender.run(ids)
            expected = counted["a forward hook"].counts()
            for name, contender in counted.items():
                if name != "TransformerLens":  # whose arithmetic is its own; checked above
                    assert_equal_counts(contender.counts(), expected, name)

        timings = contest(
            llama.what,
            {"lapefast": ours.run, "the unpatched model": lambda ids: llama.model(input_ids=ids)}
            | {name: contender.run for name, contender in others.items()},
            [(ids,) for ids in llama.ids],
            check,
            operations={
                "lapefast": llama.operations(whole=False),
                "the unpatched model": llama.operations(whole=True),
            },
            tokens=llama.tokens,
        )
    for name in ("the unpatched model", *others):
        report.row(
            f"{llama.what}: {name} takes",
            timings.ratio(name, "lapefast"),
            "x as long",
            at_least=_BARS[device].get(name),
        )


def _nnsight(llama: Llama) -> Contender:
    from baselines.nnsight import traced

    return traced(llama.copy())


def _transformer_lens(llama: Llama) -> Contender:
    """The bridge, after its counts were found equal to those of hooks in the same run."""
    from baselines.transformer_lens import bridged

    model = llama.copy()
    expected, handles = hooked(model)
    contender = bridged(model)
    with torch.no_grad():
        contender.run(llama.ids[0])
    for handle in handles:
        handle.remove()
    assert_equal_counts(contender.counts(), expected, "TransformerLens")
    return contender
