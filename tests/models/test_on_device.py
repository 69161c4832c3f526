"""Whole models on a GPU, on every backend that serves it: `--device cuda --backend triton`."""

from __future__ import annotations

import copy

import plain
import pytest
import torch
import transformers
from activation_modules import MODULES
from families import FAMILIES, shared

import lapefast as lf
from lapefast.ops.exact import is_exact

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_a_gpu(device):
    if device.type == "cpu":
        pytest.skip("needs a GPU and --device cuda; on the CPU test_families.py asks more")


def small_llama(dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """One whose FFNs are as wide as those of real models: a multiple of 16 bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=97, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(dtype).to(device)


def ids_on(device: torch.device) -> torch.Tensor:
    return (torch.arange(24).reshape(3, 8) % 16 + 1).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_outputs_and_counts_equal_those_of_a_plain_hook(family, dtype, device, backend):
    model = copy.deepcopy(shared(family.name, dtype)).to(device)
    inputs = {
        name: value.to(device) if torch.is_tensor(value) else value
        for name, value in family.inputs.items()
    }
    ids = ids_on(device)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :5]
    _assert_exact(model, family.activations(model), {"input_ids": ids, **inputs}, backend)


@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_rows_of_whole_vectors_are_counted_exactly(dtype, device, backend):
    model = small_llama(dtype, device)
    activations = {
        f"layers.{at}.mlp": layer.mlp.act_fn for at, layer in enumerate(model.model.layers)
    }
    _assert_exact(model, activations, {"input_ids": ids_on(device)}, backend)


def _assert_exact(model, activations, inputs, backend):
    with plain.hooked(activations) as seen:
        expected = model(**inputs)
    with lf.record(model, ["a"], backend=backend) as recorder:
        recorder.set(label="a")
        assert plain.same(model(**inputs), expected)
    counts = recorder.profile().counts
    for site, made in seen.items():
        active = sum((one.float() > 0).flatten(0, -2).sum(0) for one in made)
        assert torch.equal(counts[site][0], active.cpu()), site


@torch.no_grad()
def test_a_captured_graph_counts_at_every_replay_and_an_edit_changes_between(device, backend):
    model, ids = small_llama(torch.bfloat16, device), ids_on(device)
    site = "layers.0.mlp"
    values = {site: torch.tensor([0.5, 2.0])}
    edit = lf.activate({site: torch.tensor([1, 3])}, values)
    with (
        lf.record(model, ["a"], backend=backend) as recorder,
        lf.steer(model, edit, backend=backend),
    ):
        recorder.set(label="a")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        before = recorder.profile().counts[site].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(input_ids=ids, use_cache=False).logits
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        once = output.clone()
        assert torch.equal(recorder.profile().counts[site], before * 4)
        recorder._placement.states[site].edits.tables.tensors[3].fill_(-7.0)
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(output, once)


def test_silu_is_exact_on_this_device_and_what_else_is_gets_said(device, backend, capsys):
    exact = {
        (name, dtype): all(
            is_exact(name, module().to(device), dtype, device, backend) for module in modules
        )
        for name, modules in MODULES.items()
        for dtype in HALVES
    }
    with capsys.disabled():
        for (name, dtype), holds in exact.items():
            print(f"  {backend}: {name} {dtype}: {'fused' if holds else 'given'}")
    assert all(exact["silu", dtype] for dtype in HALVES)
