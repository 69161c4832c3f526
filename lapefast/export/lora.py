"""Deactivating and scaling as an ordinary PEFT adapter."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.files import write_directory
from lapefast.models.bare import unwrap
from lapefast.neurons import Edit
from lapefast.steering.fold import refuse_folded
from lapefast.steering.linear import (
    LinearEdit,
    dense_weight,
    effective_edit,
    holds_adapter,
    linear_edits,
)
from lapefast.steering.output_edits import OutputEdit, output_edits

__all__ = ["lora"]


def lora(model: nn.Module, edit: Edit, path: str | os.PathLike[str], max_rank: int = 512) -> None:
    """Write an edit that deactivates or scales neurons as a PEFT adapter of the model.

    Scaling the activations of neurons S by s adds `(s - 1) * W[:, S]` to these columns of the last
    projection W [hidden, width]: an update B @ A of rank |S|, with A [|S|, width] the selector of S
    and B [hidden, |S|] = `(s - 1) * W[:, S]`, both in W's dtype. Its scaling is 1 in every layer,
    and layers without an edited neuron are not in it. PEFT, vLLM and other engines that serve
    adapters load it, without lapefast; vLLM per request.

    Scaling outputs of a linear layer is its transpose: A holds their rows and B selects them.

    Exact but for rounding: besides B's (none where neurons are deactivated), an engine rounds W p
    before it adds B A p. So where the neurons make most of W p, what is left is off by up to half a
    spacing of W p, not of itself.

    Args:
        model: the model whose adapter it will be; a causal one where it is served as such.
        edit: made by `lapefast.deactivate` and `scale`, and joined by ``|``.
        path: a directory that does not exist yet, or is empty. It appears when all is written.
        max_rank: the most neurons in a layer. 512 is the most that vLLM takes; LLaMA-2-70B's
            fullest published layer has 1,726.

    Raises:
        InputError: the edit does not fit the model, activates or adds, has no neuron that it
            changes or too many in a layer; a last projection can't take it (see `lapefast.fold`);
            an adapter or a fold is on the model; peft is not installed; or the directory can't be
            written.
    """
    if not isinstance(max_rank, Integral) or isinstance(max_rank, bool) or max_rank < 1:
        raise InputError(f"max_rank must be an integer of at least 1, got {max_rank!r}")
    config = _config_class()
    wrapped = unwrap(model)
    if holds_adapter(model):
        raise InputError("the model holds an adapter already; merge it first (merge_and_unload)")
    refuse_folded(model)
    with write_directory(path) as directory:
        _write(wrapped, _edits(model, edit, max_rank), config, directory)


def _config_class() -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(
            "writing an adapter needs peft, which is not installed; pip install 'lapefast[export]'"
        ) from error
    return LoraConfig


def _edits(model: nn.Module, edit: Edit, max_rank: int) -> list[LinearEdit | OutputEdit]:
    """The edit of each site, after checking that it is an adapter of at most `max_rank`."""
    edit = effective_edit(model, edit)
    for site, (neurons, scale, shift) in edit.tables.items():
        shifted = shift != 0
        if shifted.any():
            raise InputError(
                f"{site}: neuron {int(neurons[shifted][0])} is activated or added to, which no "
                "adapter does; use lf.steer or the vLLM plugin "
                "(lf.export.edits)"
            )
        rank = int((scale != 1).sum())
        if rank > max_rank:
            raise InputError(
                f"{site}: {rank} neurons are edited, more than an adapter of rank {max_rank} "
                "takes; use lf.export.checkpoint, which takes any number"
            )
    outputs = output_edits(model, edit)
    for one in outputs:
        bias = one.layer._parameters.get("bias")
        if bias is not None and bias.detach().cpu()[one.neurons].any():
            raise InputError(
                f"{one.site}: an adapter leaves the bias of the outputs that are edited as it is; "
                "use lf.export.checkpoint"
            )
    return [*linear_edits(model, edit), *outputs]


def _write(
    model: nn.Module,
    edits: list[LinearEdit | OutputEdit],
    config_class: Any,
    directory: Path,
) -> None:
    paths = {module: path for path, module in model.named_modules()}
    ranks, tensors = {}, {}
    for one in edits:
        path = paths[_layer(one)]
        if path in ranks:
            raise InputError(
                f"the edit changes columns and rows of {path}, which is no one adapter; use "
                "lf.export.checkpoint"
            )
        ranks[path] = len(one.neurons)
        down, up = _factors(one)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down
        tensors[f"base_model.model.{path}.lora_B.weight"] = up
    _check_ends(model, ranks)
    rank = max(ranks.values())
    # The scaling is alpha / rank, so a layer of another rank needs an alpha of its own.
    other = {path: own for path, own in ranks.items() if own != rank}
    config = config_class(
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        task_type=_task(model),
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        rank_pattern=other,
        alpha_pattern=dict(other),
        fan_in_fan_out=type(_layer(edits[0])).__name__ == "Conv1D",
    )
    # Whole paths, as a name such as down_proj would put modules into every layer; and set here,
    # because the class makes a set of them, whose order changes from run to run.
    config.target_modules = list(ranks)
    config.save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def _layer(edit: LinearEdit | OutputEdit) -> nn.Module:
    return edit.layer if isinstance(edit, OutputEdit) else edit.ffn.last


def _factors(edit: LinearEdit | OutputEdit) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], on the CPU."""
    rank = len(edit.neurons)
    if isinstance(edit, OutputEdit):
        weight = dense_weight(edit.layer, edit.site)
        rows = weight[edit.neurons.to(weight.device)].cpu().contiguous()
        up = torch.zeros(len(weight), rank, dtype=weight.dtype)
        up[edit.neurons, torch.arange(rank)] = (edit.scale - 1).to(weight.dtype)
        return rows, up
    weight = dense_weight(edit.ffn.last, edit.ffn.site.name)
    columns = weight[:, edit.neurons.to(weight.device)].cpu()
    up = (columns.float() * (edit.scale - 1)).to(weight.dtype)
    if not up.isfinite().all():
        raise InputError(
            f"{edit.ffn.site.name}: the adapter's weights leave the range of {weight.dtype}; use "
            "lf.steer, which edits while the model runs"
        )
    down = torch.zeros(rank, weight.shape[1], dtype=weight.dtype)
    down[torch.arange(rank), edit.neurons] = 1
    return down, up.contiguous()


def _check_ends(model: nn.Module, paths: dict[str, int]) -> None:
    """PEFT takes every module whose path is one of these or ends in one: no other may."""
    ends = tuple(f".{path}" for path in paths)
    for name, _ in model.named_modules():
        if name.endswith(ends) and name not in paths:
            raise InputError(
                f"the adapter would also take hold of {name}, whose path ends as that of an edited "
                "layer; use lf.export.checkpoint"
            )


def _task(model: nn.Module) -> str | None:
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
