"""Models and tokenizers from a directory or from the Hugging Face hub, by transformers."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lapefast.errors import InputError

__all__ = ["QUANTIZATIONS", "Checkpoint", "load_model", "load_tokenizer"]

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZATIONS = ("4bit", "8bit")


@dataclass(frozen=True)
class Checkpoint:
    """Where a model and its tokenizer come from.

    Attributes:
        name: a directory that `save_pretrained` wrote, or a name on the hub.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


def load_model(
    checkpoint: Checkpoint,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    quantization: str | None = None,
    tensor_parallel: bool = False,
) -> nn.Module:
    """Loads a model in `eval()`, with its language-model head where it has one.

    Args:
        checkpoint: where it is.
        dtype: of the weights; "auto" takes the checkpoint's.
        device: such as "cpu" or "cuda:1"; None takes the GPU, if there is one.
        device_map: "auto" for a model spread over devices, or which module goes where, as JSON:
            {"model.layers.0": "cpu", "model.layers.1": "disk", ...}; needs accelerate.
        quantization: "4bit" or "8bit", by bitsandbytes.
        tensor_parallel: split each layer over the processes that torchrun started, as
            transformers' own plan for the model says; each uses its GPU, or all the CPU.

    Raises:
        InputError: there is no such model, it cannot be loaded, or an option cannot be met.
    """
    if tensor_parallel:
        options = _splitting(device, device_map, quantization)
    else:
        options = _placing(device, device_map)
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization)
    config = _config(checkpoint)
    target = options.pop("to", None)
    try:
        model = _auto_class(config).from_pretrained(
            checkpoint.name, **options, **_origin(checkpoint)
        )
        # A quantised model is put in its place while it is loaded.
        return (model if target is None or quantization else model.to(target)).eval()
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        raise _failed(checkpoint, error) from error


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Loads the tokenizer that comes with a model. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    _check_path(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(checkpoint.name, **_origin(checkpoint))
    except Exception as error:
        raise InputError(
            f"no tokenizer can be loaded from {checkpoint.name}: {_first_line(error)}"
        ) from error


def _config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    _check_path(checkpoint)
    try:
        return AutoConfig.from_pretrained(checkpoint.name, **_origin(checkpoint))
    except Exception as error:
        raise _failed(checkpoint, error) from error


def _check_path(checkpoint: Checkpoint) -> None:
    path = Path(checkpoint.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{checkpoint.name} is not a model: the directory has no config.json; give one "
                "that save_pretrained wrote"
            )
    elif path.exists():
        raise InputError(f"{checkpoint.name} is a file; give the directory that holds the model")
    elif checkpoint.name.startswith((".", "~", os.sep)) or checkpoint.name.count("/") > 1:
        raise InputError(f"the model {checkpoint.name} does not exist; check the path")


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"revision": checkpoint.revision, "trust_remote_code": checkpoint.trust_remote_code}


def _auto_class(config: Any) -> Any:
    """The class that loads the checkpoint with the head it was saved with, and no random one."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    architectures = getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or any(name in CAUSAL.values() for name in architectures):
        return transformers.AutoModelForCausalLM
    if any(name.endswith("ForConditionalGeneration") for name in architectures):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModel


def _placing(device: str | None, device_map: str | None) -> dict[str, Any]:
    if device_map is not None:
        if device is not None:
            raise InputError("give --device or --device-map, not both")
        if importlib.util.find_spec("accelerate") is None:
            raise InputError("a device map needs the accelerate library: pip install accelerate")
        return {"device_map": _device_map(device_map)}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {device!r} cannot be used: {_first_line(error)}") from error
    if torch.device(device).type == "meta":
        raise InputError("the device 'meta' cannot be used: it holds no values")
    return {"to": device}


def _device_map(text: str) -> str | dict[str, Any]:
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"the device map {text} is not JSON: {error}") from error


def _splitting(
    device: str | None, device_map: str | None, quantization: str | None
) -> dict[str, Any]:
    for given, option in (
        (device, "--device"),
        (device_map, "--device-map"),
        (quantization, "--quantization"),
    ):
        if given is not None:
            raise InputError(f"give {option} or --tensor-parallel, not both")
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise InputError(
            "tensor parallelism needs several processes; start them with "
            "torchrun --nproc-per-node 2 -m lapefast"
        )
    from transformers.distributed import DistributedConfig

    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}  # transformers 4


def _quantization(name: str) -> Any:
    if name not in QUANTIZATIONS:
        raise InputError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {name!r}")
    for library in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise InputError(f"{name} quantization needs {library}: pip install {library}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{f"load_in_{name}": True})


def _failed(checkpoint: Checkpoint, error: Exception) -> InputError:
    reason = _first_line(error)
    text = str(error)
    if "trust_remote_code" in text:
        reason = "it comes with Python code of its own; pass --trust-remote-code to run that"
    elif "couldn't connect" in text or "Connection" in type(error).__name__:
        reason = "there is no such directory, and the hub cannot be reached"
    elif "is not a local folder and is not a valid model identifier" in text:
        reason = "there is no such directory, and no such model on the hub"
    return InputError(f"the model {checkpoint.name} cannot be loaded: {reason}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
