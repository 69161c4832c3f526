"""Decoding with edited neurons beside the unpatched model: one step, as one CUDA graph."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import transformers
from inputs import EDITED
from torch import Tensor, nn

import lapefast as lf
from lapefast.models import find_sites
from lapefast.models.placed import RowIndex
from lapefast.steering import Steering

_CACHE = 1024  # positions; every step of a contest takes the next
_ROUNDS, _STEPS = 21, 16


@pytest.mark.only_on("cuda", reason="CUDA graphs need a GPU; `make gpu` measures it")
@pytest.mark.parametrize(("batch", "bar"), [(1, 1.01), (64, 1.02)])
def test_decode_with_edits(llama, contest, report, batch, bar):
    """Batch 1 under `lapefast.steer`; of 64 sequences each has an edit of its own."""
    edits = [_edit(llama.model, seed) for seed in range(batch)]
    steered, reference = llama.copy(), llama.copy()
    _zero_products(reference, edits)
    tokens = torch.randint(llama.shape.vocabulary, (batch, 1), device=llama.ids[0].device)
    with torch.no_grad(), lf.steer(steered, edits[0]) as steering:
        if batch > 1:
            _one_each(steering, edits)
        unpatched, edited = _step(llama.model, tokens), _step(steered, tokens)
        expected = _step(reference, tokens)

        def check():
            logits = edited()
            assert torch.equal(logits, expected())
            assert not torch.equal(logits, unpatched())

        what = f"decode, {llama.shape.name}, bf16, batch {batch}, static cache, CUDA graph"
        timings = contest(
            what,
            {"lapefast": edited, "the unpatched model": unpatched},
            [()],
            check,
            rounds=_ROUNDS,
            repeat=_STEPS,
            tokens=batch,
        )
    report.row(
        f"{what}: {EDITED:.0%} of neurons edited, {batch} edits",
        timings.ratio("lapefast", "the unpatched model"),
        "x as long",
        at_most=bar,
    )


def _edit(model: nn.Module, seed: int) -> lf.Edit:
    generator = torch.Generator().manual_seed(seed)
    return lf.deactivate(
        {
            site.name: torch.randperm(site.width, generator=generator)[: round(EDITED * site.width)]
            for site in find_sites(model)
        }
    )


def _one_each(steering: Steering, edits: list[lf.Edit]) -> None:
    """Give each sequence its edit, in what `lapefast.steer` placed, which takes one for all."""
    for site, state in steering._placement.states.items():
        tables = [edit.tables[site] for edit in edits]
        device = state.edits.neurons.device
        neurons, scale, shift = (torch.cat(parts) for parts in zip(*tables, strict=True))
        ends = torch.tensor([len(table[0]) for table in tables]).cumsum(0)
        state.edits = replace(
            state.edits,
            sets=RowIndex(torch.arange(len(edits), dtype=torch.int32, device=device)),
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device, torch.int32),
            neurons=neurons.to(device, torch.int32),
            scale=scale.to(device),
            shift=shift.to(device),
        )


def _zero_products(model: nn.Module, edits: list[lf.Edit]) -> None:
    """The same edits by plain hooks: a deactivated neuron's product is 0."""
    for site, layer in zip(find_sites(model), model.model.layers, strict=True):
        kept = torch.ones(len(edits), 1, site.width, device=layer.mlp.down_proj.weight.device)
        for row, edit in enumerate(edits):
            kept[row, 0, edit.tables[site.name][0].to(kept.device)] = 0

        mask = functools.partial(_masked, kept.bfloat16())
        layer.mlp.down_proj.register_forward_pre_hook(mask)


def _masked(kept: Tensor, module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0] * kept,)


def _step(model: nn.Module, tokens: Tensor):
    """Decodes ``tokens`` at the next position and returns the logits."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=_CACHE)

    def step() -> Tensor:
        return model(input_ids=tokens, past_key_values=cache).logits

    step()  # allocates the cache, which a graph must not
    if tokens.device.type == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
