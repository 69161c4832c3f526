"""A deactivating or scaling edit as a PEFT adapter, written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lapefast.models.structure import find_ffns
from lapefast.neurons import Edit


def adapter(model: nn.Module, edit: Edit, path: Path) -> None:
    """A <- s * a is W[:, n] += (s - 1) * W[:, n] on the last projection: rank 1 per neuron."""
    paths = {id(module): name for name, module in model.named_modules()}
    tensors, ranks = {}, {}
    for ffn in find_ffns(model):
        neurons, scale, shift = edit.tables.get(ffn.site.name, ((), (), ()))
        if not len(neurons):
            continue
        assert not shift.any()
        name = paths[id(ffn.last)]
        down = torch.zeros(len(neurons), ffn.site.width)
        down[torch.arange(len(neurons)), neurons] = 1
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        weight = ffn.last.weight.detach()[:, neurons] * (scale - 1)
        tensors[f"base_model.model.{name}.lora_B.weight"] = weight.contiguous()
        ranks[name] = len(neurons)
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    largest = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": largest,
        "lora_alpha": largest,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
