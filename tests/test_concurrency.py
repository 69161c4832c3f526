"""Threads that profile and steer at once get what each gets alone, bit for bit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lapefast as lf

TURNS = 4


def tiny(seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=96 + 8 * seed,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def texts(seed: int) -> torch.Tensor:
    return torch.randint(0, 60, (6, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def work(model: LlamaForCausalLM, seed: int) -> list[torch.Tensor]:
    """A profile, and logits of a batch steered sequence by sequence, several times over."""
    found = []
    for turn in range(TURNS):
        ids = texts(seed + turn)
        profile = lf.profile(model, {"a": ids, "b": ids.flip(0)}, batch_size=2, progress=False)
        found += [*profile.counts.values(), *profile.sums.values()]
        chosen = {site: list(range(turn, 40, 3)) for site in profile.sites}
        edits = [lf.deactivate(chosen), None, lf.scale(chosen, 1.5)]
        with lf.steer(model, edits), lf.record(model, ["a"]) as recorder:
            recorder.set(label="a")
            found.append(model(ids[:3]).logits)
        found += recorder.profile().counts.values()
    return found


def at_once(jobs) -> list:
    """What the jobs return, all of them started at the same moment."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_models_are_profiled_and_steered_at_once(dtype):
    models = [tiny(0, dtype), tiny(1, dtype)]
    alone = [work(model, seed) for seed, model in enumerate(models)]
    together = at_once([lambda m=model, s=seed: work(m, s) for seed, model in enumerate(models)])
    for mine, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, mine, expected))
