"""Whole models on a GPU, on every backend that serves it: `--device cuda --backend triton`."""

from __future__ import annotations

import copy

import plain
import pytest
import torch
from families import FAMILIES, shared

import lapefast as lf
from lapefast.ops.exact import is_exact

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_a_gpu(device):
    if device.type == "cpu":
        pytest.skip("needs a GPU and --device cuda; on the CPU test_families.py asks more")
    with device:
        yield


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_outputs_and_counts_equal_those_of_a_plain_hook(family, dtype, device, backend):
    model = copy.deepcopy(shared(family.name, dtype)).to(device)
    inputs = {
        name: value.to(device) if torch.is_tensor(value) else value
        for name, value in family.inputs.items()
    }
    ids = torch.arange(24, device=device).reshape(3, 8) % 16 + 1
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :5]
    with plain.hooked(family.activations(model)) as seen:
        expected = model(input_ids=ids, **inputs)
    with lf.record(model, ["a"], backend=backend) as recorder:
        recorder.set(label="a")
        assert plain.same(model(input_ids=ids, **inputs), expected)
    counts = recorder.profile().counts
    for site, activations in seen.items():
        active = sum((one.float() > 0).flatten(0, -2).sum(0) for one in activations)
        assert torch.equal(counts[site][0], active.cpu()), site


@torch.no_grad()
def test_a_captured_graph_counts_at_every_replay_and_an_edit_changes_between(device, backend):
    model = copy.deepcopy(shared("llama", torch.bfloat16)).to(device)
    ids = torch.arange(24, device=device).reshape(3, 8) + 1
    site = lf.models.find_sites(model)[0].name if hasattr(lf, "models") else "layers.0.mlp"
    edit = lf.activate({site: torch.tensor([1, 3])}, {site: torch.tensor([0.5, 2.0])})
    with lf.record(model, ["a"], backend=backend) as recorder, lf.steer(model, edit):
        recorder.set(label="a")
        stream = torch.cuda.Stream()
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
        table = recorder._placement.states[site].edits
        table.shift.fill_(-7.0)
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(output, once)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_common_activations_are_exact_on_this_device(activation, dtype, device, backend):
    module = {"silu": torch.nn.SiLU, "relu": torch.nn.ReLU}[activation]()
    assert is_exact(activation, module, dtype, device, backend)
