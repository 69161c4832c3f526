"""Decoding with edited neurons beside the unpatched model: one step; on a GPU as one CUDA graph."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import transformers
from inputs import EDITED
from models import TINY, Llama, Shape, build, multiplies_bfloat16
from timing import median_interval
from torch import Tensor, nn

import lapefast as lf
from lapefast.models import find_sites

# By batch. A round is a short run of steps, each at the next position of its own cache: many short
# rounds tell a percent where a machine's own speed changes by ten within a second.
_ROUNDS = {1: 361, 64: 321}
_STEPS = {1: 4, 64: 1}
_BARS = {("cuda", 1): 1.01, ("cuda", 64): 1.02, ("cpu", 1): 1.03, ("cpu", 64): 1.03}


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("name", ["demo", "large"])
def test_decode_with_edits(llama, contest, report, device, quick, batch, name):
    """Batch 1 under one edit; of 64 sequences each has an edit of its own."""
    if name == "demo" and device != "cpu":
        pytest.skip("the demo model says nothing of a GPU, which waits for its launches")
    what, model = _model(name, llama, device, quick)
    edits = [_edit(model, seed) for seed in range(batch)]
    # All are copies: attributes of a copied module take longer to find, which a small step shows.
    model, steered, reference = _copy(model), _copy(model), _copy(model)
    _zero_products(reference, edits)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (batch, 1), device=model.device)
    with torch.no_grad(), lf.steer(steered, edits if batch > 1 else edits[0]):
        unpatched, edited = _step(model, tokens), _step(steered, tokens)
        expected = _step(reference, tokens)

        def check():
            logits = edited()
            assert torch.equal(logits, expected())
            assert not torch.equal(logits, unpatched())

        what = f"decode, {what}, batch {batch}, static cache"
        what += ", CUDA graph" if device == "cuda" else ""
        timings = contest(
            what,
            {"lapefast": edited, "the unpatched model": unpatched},
            [()],
            check,
            rounds=_ROUNDS[batch],
            repeat=_STEPS[batch],
            tokens=batch,
        )
    ratios = timings.ratio("lapefast", "the unpatched model")
    what = f"{what}: {EDITED:.0%} of neurons edited, {batch} edits"
    report.row(what, ratios, "x as long")
    report.row(
        f"{what}, upper end of the median's 95% interval",
        median_interval(ratios)[1],
        "x as long",
        at_most=_BARS[device, batch],
    )


def _model(name: str, llama: Llama, device: str, quick: bool) -> tuple[str, nn.Module]:
    if name == "demo" and not quick:
        pytest.importorskip("babel", reason="the demo model needs babel: install lapefast with it")
        from lapefast import demo

        return "demo model, float32", demo.load(progress=False).model
    if device == "cuda" or quick:
        return f"{llama.shape.name}, bf16", llama.model
    shape = Shape("100M Llama", 1, 1, 768, 2048, 10, 12, 12, 20000)
    if multiplies_bfloat16(device):
        return f"{shape.name}, bf16", build(shape, device).model
    return f"{shape.name}, float32", build(shape, device, torch.float32).model


def _copy(model: nn.Module) -> nn.Module:
    return Llama(TINY, model, []).copy()


def _edit(model: nn.Module, seed: int) -> lf.Edit:
    generator = torch.Generator().manual_seed(seed)
    return lf.deactivate(
        {
            site.name: torch.randperm(site.width, generator=generator)[: round(EDITED * site.width)]
            for site in find_sites(model)
        }
    )


def _zero_products(model: nn.Module, edits: list[lf.Edit]) -> None:
    """The same edits by plain hooks: a deactivated neuron's product is 0."""
    for site, layer in zip(find_sites(model), model.model.layers, strict=True):
        kept = torch.ones(len(edits), 1, site.width, device=layer.mlp.down_proj.weight.device)
        for row, edit in enumerate(edits):
            kept[row, 0, edit.tables[site.name][0].to(kept.device)] = 0

        mask = functools.partial(_masked, kept.to(layer.mlp.down_proj.weight.dtype))
        layer.mlp.down_proj.register_forward_pre_hook(mask)


def _masked(kept: Tensor, module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0] * kept,)


def _step(model: nn.Module, tokens: Tensor):
    """Decodes ``tokens`` at the next position and returns the logits."""
    positions = (_ROUNDS[len(tokens)] + 2) * _STEPS[len(tokens)] + 8
    cache = transformers.StaticCache(config=model.config, max_cache_len=positions)

    # Renamed in transformers 5.24, where the old name costs a warning at every step.
    named = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in named else "past_key_values"

    def step() -> Tensor:
        return model(input_ids=tokens, **{name: cache}).logits

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
