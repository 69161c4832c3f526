"""`--engine`: the pass of each, and the options that it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lapefast.cli.options import Loaded, ModelOptions, TextOptions
from lapefast.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lapefast.profiles import Profile

__all__ = ["load_for"]


def load_for(
    engine: str,
    model: str,
    corpora: dict[str, str],
    text: TextOptions,
    loading: ModelOptions,
    group: ProcessGroup | None,
    passed: Mapping[str, Any],
    tensor_parallel: bool,
    tensor_parallel_size: int,
) -> tuple[Callable[..., Profile], Loaded]:
    """The pass of an engine with its own options, and what it is called with.

    Args:
        engine, model, corpora, text, loading: as given to the command.
        group: the processes that torchrun started.
        passed: options of transformers' pass alone.
        tensor_parallel: whether those processes split the model.
        tensor_parallel_size: vLLM's.

    Raises:
        InputError: an option of another engine is given, or as `ModelOptions.load`.
    """
    if engine == "vllm":
        if group is not None:
            raise InputError("vLLM starts its own processes: run the command without torchrun")
        _refuse(engine, {
            "--device": loading.device,
            "--device-map": loading.device_map,
            "--quantization": loading.quantization,
            "--threads": loading.threads,
            "--tensor-parallel": tensor_parallel,
            "--backend": passed["backend"],
            "--no-exact": not passed["exact"],
            "--resume": passed["resume"],
            "--save-every": "save_every" in passed,
            "--part": passed["part"],
            "--until-stable": passed["until"],
        })  # fmt: skip
        from lapefast.profiling.vllm import profile

        run = functools.partial(
            profile,
            tensor_parallel_size=tensor_parallel_size,
            dtype=loading.dtype,
            revision=loading.revision,
            trust_remote_code=loading.trust_remote_code,
            seed=loading.seed,
        )
        # vLLM loads the model itself.
        return run, Loaded(model, loading.load_tokenizer(model, corpora, text))
    _refuse(engine, {"--tensor-parallel-size": tensor_parallel_size > 1})
    from lapefast import profile

    loaded = loading.load(model, corpora, text, tensor_parallel=tensor_parallel)
    shared = None if tensor_parallel else group
    return functools.partial(profile, process_group=shared, **passed), loaded


def _refuse(engine: str, given: dict[str, object]) -> None:
    for option, value in given.items():
        if value:
            raise InputError(
                f"{option} is an option of another engine than {engine}; leave it out "
                "(docs/serving.md says what vLLM takes)"
            )
