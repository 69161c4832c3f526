"""A model's fingerprint: the same for one model however it is wrapped, another for another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lapefast.models.structure import find_ffns

_WEIGHTS = 1024


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over each site's name, width and activation and 1,024 weights of its last projection.

    The weights are evenly spaced and rounded to bfloat16, and those below 2^-16 count as 0, so that
    loading a bfloat16 checkpoint in float32 or float16 changes nothing (a float32 checkpoint that
    is narrowed to float16 is another model); adapters on the projection count. Unlike a
    configuration's hash it tells a base model from its instruct version and stays over library
    versions.
    """
    digest = hashlib.sha256()
    for ffn in find_ffns(model, mixtures=True):
        site = ffn.site
        width = "x".join(map(str, site.shape))
        digest.update(f"{site.name}|{width}|{site.activation}\n".encode())
        for name, parameter in ffn.last.named_parameters():
            if site.experts and not name.startswith("down_proj"):
                continue
            digest.update(name.removeprefix("base_layer.").encode())
            digest.update(_sample(_on_hand(ffn.last, name, parameter)))
    return digest.hexdigest()


def _sample(weight: Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    step = max(flat.numel() // _WEIGHTS, 1)
    chosen = flat[::step][:_WEIGHTS].cpu()
    if chosen.is_floating_point():
        rounded = chosen.to(torch.bfloat16)
        # float16 holds every bfloat16 from here on, but not the smaller ones.
        rounded = torch.where(rounded.abs() < 2**-16, 0, rounded)
        return rounded.view(torch.int16).numpy().tobytes()
    return chosen.numpy().tobytes()


def _on_hand(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The weight itself, also where accelerate keeps it off the device."""
    if parameter.device.type != "meta":
        return parameter
    owner = module.get_submodule(name.rpartition(".")[0])
    return owner._hf_hook.weights_map[name.rpartition(".")[2]]
