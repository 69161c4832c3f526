"""What the pass is made of, what sums add to it, and its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from baselines.hook import hook
from models import Llama, assert_equal_counts, profiling
from processes import run_alone

from lapefast import ops

# Of the two, only a CPU's pass has bars of its own; the others stand in bench_contenders.
_BARS = {"cpu": {"bare": 1.3, "matrix": 1.5, "sums": 1.1}, "cuda": {}}


def test_parts_of_the_pass(llama, contest, report, device):
    bars, what = _BARS[device], llama.what
    hooked = hook(llama.copy())
    with (
        torch.no_grad(),
        profiling(llama.copy(), "counts") as counted,
        profiling(llama.copy(), "counts", "sums") as summed,
    ):

        def check():
            for contender in (hooked, counted, summed):
                contender.run(llama.ids[0])
            for contender in (counted, summed):
                assert_equal_counts(contender.counts(), hooked.counts(), "lapefast")

        timings = contest(
            f"parts of the {what}",
            {
                "lapefast": counted.run,
                "with sums": summed.run,
                "the unpatched bare decoder": lambda ids: llama.model.model(input_ids=ids),
                **_parts(llama),
            },
            [(ids,) for ids in llama.ids],
            check,
            operations={
                "lapefast": llama.operations(whole=False),
                "matrix products and attention": llama.operations(whole=False),
            },
        )
    report.row(
        f"{what}: the unpatched bare decoder",
        timings.ratio("the unpatched bare decoder", "lapefast"),
        "x as long",
        at_least=bars.get("bare"),
    )
    report.row(
        f"{what}: times its matrix products and attention",
        timings.ratio("lapefast", "matrix products and attention"),
        "x",
        at_most=bars.get("matrix"),
    )
    report.row(
        f"{what}: with sums",
        timings.ratio("with sums", "lapefast"),
        "x as long",
        at_most=bars.get("sums"),
    )
    # Norms, rotary embeddings, residuals, and what Python takes.
    rest = zip(
        timings["lapefast"],
        timings["matrix products and attention"],
        timings["activation, by lapefast"],
        strict=True,
    )
    report.row(f"{what}: the rest", [max(whole - a - b, 0.0) for whole, a, b in rest], "s")


def _parts(llama: Llama):
    """Each part alone, in all layers: what lapefast leaves out, keeps and replaces."""
    shape, model = llama.shape, llama.model
    options = {"dtype": torch.bfloat16, "device": llama.ids[0].device}
    hidden = torch.randn(llama.tokens, shape.hidden, **options)
    gate, up = (torch.randn(llama.tokens, shape.intermediate, **options) for _ in range(2))
    head_size = shape.hidden // shape.heads
    query = torch.randn(shape.rows, shape.heads, shape.length, head_size, **options)
    key = torch.randn(shape.rows, shape.key_value_heads, shape.length, head_size, **options)
    counts = torch.zeros(1, shape.intermediate, dtype=torch.int64, device=gate.device)
    flags = torch.zeros(2, dtype=torch.int64, device=gate.device)
    grouped = shape.heads != shape.key_value_heads

    def matrix_products(ids):
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection(hidden)
            F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=grouped)
            attention.o_proj(hidden)
            mlp.gate_proj(hidden)
            if layer is not model.model.layers[-1]:
                mlp.up_proj(hidden)
                mlp.down_proj(gate)

    def counted_activation(ids):
        for _ in range(shape.layers - 1):
            ops.profile(gate, up, "silu", 0.0, None, counts, None, None, None, flags)
        ops.observe(gate, "silu", 0.0, None, counts, None, None, flags)

    def eager_activation(ids):
        for _ in range(shape.layers):
            F.silu(gate) * up

    return {
        "matrix products and attention": matrix_products,
        "activation, by lapefast": counted_activation,
        "activation, eager and not counted": eager_activation,
        "the head": lambda ids: model.lm_head(hidden),
    }


_MEMORY = """
import sys, torch, transformers, lapefast as lf
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
"""


@pytest.mark.only_on("cpu", reason="the memory of a process, which `make bench` measures")
def test_peak_memory_of_a_longer_corpus(benchmark, report, quick):
    def peak(rows: int) -> int:
        return run_alone(_MEMORY, rows)[1]

    rows = 4 if quick else 100
    growth = benchmark.pedantic(lambda: peak(10 * rows) / peak(rows), rounds=1)
    report.row("peak memory of a pass over 10 times the corpus", growth, "x", at_most=1.03)
