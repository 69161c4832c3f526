"""vLLM's engines for the tests: started and ended in this process, and asked for tokens."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tiny import NEW_TOKENS
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from lapefast.engines.vllm import ARGUMENT, ENVIRONMENT

Ask = tuple[list[int], "str | None"]
"""A prompt, and the name of the edit that it asks for, if it asks."""


@contextmanager
def engine(path: Path, **options) -> Iterator[LLM]:
    """An engine for a tiny model; small steps and blocks, so that prompts come in parts."""
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        **options,
    }
    if os.environ.get(ENVIRONMENT):
        options.setdefault("worker_cls", "lapefast.engines.vllm.Worker")
    llm = LLM(str(path), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def asking(name: str | None, tokens: int = NEW_TOKENS, **options) -> SamplingParams:
    """Greedy decoding of so many tokens under an edit."""
    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if name is None else {ARGUMENT: name},
        **options,
    )


def answers(llm: LLM, asks: Sequence[Ask], tokens: int = NEW_TOKENS) -> list[list[int]]:
    """What an engine generates for prompts given all at once."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in asks],
        [asking(name, tokens) for _, name in asks],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
