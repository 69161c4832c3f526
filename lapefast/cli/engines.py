"""`--engine`: the pass of each, and the options that it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from lapefast.cli.options import Loaded, ModelOptions, TextOptions
from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.profiles import Profile

__all__ = ["load_for"]


def load_for(
    engine: str,
    model: str,
    corpora: dict[str, str],
    text: TextOptions,
    loading: ModelOptions,
    exact: bool,
    backend: str | None,
    tensor_parallel_size: int,
) -> tuple[Callable[..., Profile], Loaded]:
    """The pass of an engine with its own options, and what it is called with.

    Raises:
        InputError: an option of another engine is given, or as `ModelOptions.load`.
    """
    if engine == "vllm":
        _refuse(engine, {
            "--device": loading.device,
            "--device-map": loading.device_map,
            "--quantization": loading.quantization,
            "--threads": loading.threads,
            "--backend": backend,
            "--no-exact": not exact,
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

    loaded = loading.load(model, corpora, text)
    return functools.partial(profile, exact=exact, backend=backend), loaded


def _refuse(engine: str, given: dict[str, object]) -> None:
    for option, value in given.items():
        if value:
            raise InputError(
                f"{option} is an option of another engine than {engine}; leave it out "
                "(docs/serving.md says what vLLM takes)"
            )
