"""The model that transformers makes of a checkpoint, as far as its sites and fingerprint need it.

vLLM keeps a model's weights fused, cut and repacked, so the fingerprint is taken from its files: an
empty model of transformers, given the last projections as they lie in the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lapefast.engines.vllm.served import Served
from lapefast.errors import InputError
from lapefast.models import fingerprint
from lapefast.models.structure import find_ffns

__all__ = ["ENVIRONMENT", "check_fingerprint", "checkpoint_fingerprint", "empty_model"]

ENVIRONMENT = "LAPEFAST_CHECK_FINGERPRINT"
_log = logging.getLogger("vllm.lapefast")  # under vLLM's logger, so that a server shows it


def check_fingerprint(config: Any, served: Served) -> None:
    """Compare a vLLM model configuration's checkpoint with the model that the edits are bound to.

    `LAPEFAST_CHECK_FINGERPRINT=0` leaves the comparison out.

    Raises:
        InputError: they differ.
    """
    if os.environ.get(ENVIRONMENT) == "0":
        return
    actual = checkpoint_fingerprint(config)
    expected = served.layout.fingerprint
    if None not in (actual, expected) and actual != expected:
        raise InputError(
            f"the edits are bound to {served.layout.model or 'a model'} with fingerprint "
            f"{expected[:12]}, but {config.model} has {actual[:12]}; serve that model, or set "
            f"{ENVIRONMENT}=0 if these weights are meant"
        )


def checkpoint_fingerprint(config: Any) -> str | None:
    """The fingerprint of a vLLM model configuration's checkpoint, by no more weights than it needs.

    None, with a warning that says why, for one that can't be read so: quantised, or not
    safetensors.

    Raises:
        InputError: it has FFNs that lapefast can't find, or weights of another shape.
    """
    try:
        directory = _directory(config.model, config.revision)
        model = empty_model(directory, trust_remote_code=config.trust_remote_code)
        return fingerprint(_filled(model, directory))
    except InputError:
        raise
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        _log.warning(
            "The fingerprint of %s can't be taken (%s: %s): its sites and widths are checked and "
            "the weights are not.",
            config.model, type(error).__name__, error,
        )  # fmt: skip
        return None


def empty_model(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The causal model of a configuration, on the meta device: its structure without weights.

    Args:
        name: a directory, or a name on the hub.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        InputError: it is an encoder-decoder.
        Exception: of transformers and the hub, each its own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, revision=revision, **options)
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder; under vLLM lapefast handles decoders only")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def _filled(model: nn.Module, directory: Path) -> nn.Module:
    """The model with the last projections of a directory's safetensors."""
    files = _files(directory)
    paths = {id(module): path for path, module in model.named_modules()}
    for ffn in find_ffns(model):
        for name, empty in list(ffn.last.named_parameters()):
            tensor = _read(directory, files, f"{paths[id(ffn.last)]}.{name}")
            if tensor.shape != empty.shape:
                raise InputError(
                    f"{name} of {ffn.site.name} is {list(tensor.shape)} in {directory}, where its "
                    f"configuration says {list(empty.shape)}"
                )
            ffn.last.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return model


def _directory(model: str, revision: str | None) -> Path:
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def _files(directory: Path) -> dict[str, str]:
    """Tensor -> the safetensors file that holds it."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_text("utf-8"))["weight_map"]
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _read(directory: Path, files: dict[str, str], name: str) -> Tensor:
    from safetensors import safe_open

    if name not in files:
        # A checkpoint of the bare model has not its head's prefix.
        name = next((key for key in files if name.endswith(f".{key}")), name)
    with safe_open(directory / files[name], framework="pt") as file:
        return file.get_tensor(name)
