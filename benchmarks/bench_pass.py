"""The whole pass beside the unpatched model and the published way, and its memory."""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers
from baselines.published import published
from conftest import ratio

import lapefast as lf

_ROWS, _LENGTH, _VOCABULARY = 4, 512, 32000


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=_VOCABULARY,
        max_position_embeddings=2048,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def test_whole_pass(model, contest, report):
    ids = torch.randint(_VOCABULARY, (_ROWS, _LENGTH))
    # A copy each, so that what is placed in one stays there while the others run.
    counted, summed, counted_published = (copy.deepcopy(model) for _ in range(3))
    with (
        torch.no_grad(),
        _placed(counted, ("counts",)) as recorder,
        _placed(summed, ("counts", "sums")),
        published(counted_published) as expected,
    ):

        def check():
            counted_published(input_ids=ids)
            counted.model(input_ids=ids, use_cache=False)
            counts = recorder.profile().counts
            for site, over_zero in zip(counts, expected, strict=True):
                assert torch.equal(counts[site][0], over_zero), site

        seconds = contest(
            lambda: counted.model(input_ids=ids, use_cache=False),
            {
                "published": lambda: counted_published(input_ids=ids),
                "unpatched": lambda: model(input_ids=ids),
                "bare": lambda: model.model(input_ids=ids),
                "sums": lambda: summed.model(input_ids=ids, use_cache=False),
                "matrix": _matrix_products(model),
            },
            check,
        )
    what = "whole pass, 168M Llama, bf16, 4 x 512"
    report(f"{what}: the published forward takes", 2.0, ratio(seconds, "published"), "x as long")
    report(f"{what}: the unpatched model", 1.6, ratio(seconds, "unpatched"), "x as long")
    report(f"{what}: the unpatched bare decoder", 1.3, ratio(seconds, "bare"), "x as long")
    matrix = 1 / ratio(seconds, "matrix")
    report(f"{what}: times its matrix products and attention", 1.5, matrix, "x", at_least=False)
    report(f"{what}: with sums", 1.1, ratio(seconds, "sums"), "x as long", at_least=False)
    tokens = _ROWS * _LENGTH / statistics.median(seconds["lapefast"])
    report(f"{what}: speed", None, tokens, " tokens/s")


@contextmanager
def _placed(model, names):
    with lf.record(model, ["en"], statistics=names) as recorder:
        recorder.end_at_last_site()
        recorder.set(label="en")
        yield recorder


def _matrix_products(model):
    """The linear layers and the attention that the pass runs, and nothing else."""
    tokens, heads = _ROWS * _LENGTH, model.config.num_attention_heads
    hidden = torch.randn(tokens, model.config.hidden_size, dtype=torch.bfloat16)
    wide = torch.randn(tokens, model.config.intermediate_size, dtype=torch.bfloat16)
    by_head = torch.randn(_ROWS, heads, _LENGTH, hidden.shape[1] // heads, dtype=torch.bfloat16)

    def run():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection(hidden)
            F.scaled_dot_product_attention(by_head, by_head, by_head, is_causal=True)
            attention.o_proj(hidden)
            mlp.gate_proj(hidden)
            if layer is not model.model.layers[-1]:
                mlp.up_proj(hidden)
                mlp.down_proj(wide)

    return run


_MEMORY = """
import resource, sys, torch, transformers, lapefast as lf
config = transformers.LlamaConfig(
    hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    vocab_size=8000, max_position_embeddings=512,
)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
class Texts:
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(int(sys.argv[1])):
            yield torch.randint(8000, (512,), generator=generator).tolist()
lf.profile(model, {"en": Texts()}, seq_len=512, batch_size=4, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_of_a_longer_corpus(benchmark, report):
    def peak(rows: int) -> int:
        command = [sys.executable, "-c", _MEMORY, str(rows)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def measure() -> float:
        return peak(2000) / peak(200)

    growth = benchmark.pedantic(measure, rounds=1)
    report("peak memory of a pass over 10 times the corpus", 1.03, growth, "x", at_least=False)
