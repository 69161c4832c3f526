"""What tells one model from another: a fingerprint that names it, and a digest of its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lapefast.models.bare import bare_model, named_modules
from lapefast.models.parallel import parallel_size
from lapefast.models.structure import find_ffns

_WEIGHTS = 1024
_OF_EACH = 256


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
        if ffn.listed is not None:
            _digest_listed(digest, [expert.last for expert in ffn.listed.experts])
            continue
        for name, parameter in ffn.last.named_parameters():
            if site.experts and not name.startswith("down_proj"):
                continue
            # transformers 4 hides the bias of a split layer behind an underscore.
            digest.update(name.removeprefix("base_layer.").lstrip("_").encode())
            digest.update(_sample(ffn.last, name, parameter))
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str | None:
    """SHA-256 over 256 values of every parameter of the bare model, and its adapters' states.

    It tells apart what the fingerprint need not: models that differ anywhere before an activation,
    by an adapter on the attention for instance, whose counts must not be added up. Names of
    parameters are transformers' own, which another version of it may change. None where the
    parameters are spread over processes.
    """
    if parallel_size(model) > 1:
        return None
    digest = hashlib.sha256()
    for path, module in named_modules(bare_model(model)):
        if hasattr(module, "base_layer"):  # an adapter's, by PEFT
            names = ("active_adapters", "disable_adapters", "scaling")
            states = [getattr(module, name, None) for name in names]
            digest.update(f"{path}|{states}\n".encode())
        for name, parameter in module.named_parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            shape = list(getattr(state, "original_qshape", parameter.shape))
            digest.update(f"{path}.{name.lstrip('_')}|{shape}\n".encode())
            digest.update(_sample(module, name, parameter, _OF_EACH))
    return digest.hexdigest()


def _digest_listed(digest: hashlib._Hash, lasts: list[nn.Module]) -> None:
    """Take the last projections of experts as the one tensor that transformers 5 stacks them to."""
    for name, first in lasts[0].named_parameters():
        own = name.removeprefix("base_layer.").lstrip("_")
        digest.update(("down_proj" if own == "weight" else own).encode())
        size, parameters = first.numel(), [last.get_parameter(name) for last in lasts]
        if not first.is_floating_point():
            for last, parameter in zip(lasts, parameters, strict=True):
                digest.update(_sample(last, name, parameter, max(_WEIGHTS // len(lasts), 1)))
            continue
        step = max(len(lasts) * size // _WEIGHTS, 1)
        chosen = torch.arange(0, len(lasts) * size, step)[:_WEIGHTS]
        for number, last in enumerate(lasts):
            weight = _on_hand(last, name, parameters[number]).detach().reshape(-1)
            places = chosen[chosen // size == number] % size
            digest.update(_rounded(weight[places.to(weight.device)].cpu()))


def _sample(module: nn.Module, name: str, parameter: Tensor, most: int = _WEIGHTS) -> bytes:
    weight = _on_hand(module, name, parameter)
    four_bit = getattr(parameter, "quant_state", None)
    flat = weight.detach().reshape(-1)
    if four_bit is not None:
        flat = flat.view(torch.uint8)
    step = max(flat.numel() // most, 1)
    if getattr(four_bit, "packing_format_for_cpu", False):
        places = torch.arange(0, flat.numel(), step)[:most]
        return _unpacked(flat, four_bit.shape[1], places).numpy().tobytes()
    chosen = flat[::step][:most].cpu()
    return _rounded(chosen) if chosen.is_floating_point() else chosen.numpy().tobytes()


def _rounded(weights: Tensor) -> bytes:
    rounded = weights.to(torch.bfloat16)
    # float16 holds every bfloat16 from here on, but not the smaller ones.
    rounded = torch.where(rounded.abs() < 2**-16, 0, rounded)
    return rounded.view(torch.int16).numpy().tobytes()


def _unpacked(packed: Tensor, width: int, places: Tensor) -> Tensor:
    """Bytes of a 4-bit weight [rows, width] as they were loaded.

    On a CPU with bfloat16 products bitsandbytes packs them anew when a layer first runs: of 32 rows
    and two columns, which are 64 numbers, the second half lies above the first
    (`bitsandbytes.functional._convert_weight_packed_for_cpu`).
    """
    numbers = torch.stack([2 * places, 2 * places + 1])
    rows, columns = numbers // width, numbers % width
    place = rows % 32 * 2 + columns % 2
    held = packed[(rows // 32 * (width // 2) + columns // 2) * 32 + place % 32]
    high, low = torch.where(place < 32, held & 15, held >> 4)
    return high << 4 | low


def _on_hand(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The weight itself, also where accelerate keeps it off the device or processes share it."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if parameter.device.type != "meta":
        return parameter
    owner = module.get_submodule(name.rpartition(".")[0])
    return owner._hf_hook.weights_map[name.rpartition(".")[2]]
