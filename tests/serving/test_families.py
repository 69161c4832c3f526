"""Models whose FFNs vLLM builds in other ways: plain ones, and other activations."""

from __future__ import annotations

import pytest
import tiny
from engines import answers, engine
from tiny import asked
from transformers import GemmaConfig, GPT2Config, OPTConfig, Qwen2Config

COMMON = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {
    **COMMON,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    # gate and up in one tensor; GELU by its tanh form
    "gemma": GemmaConfig(**GATED, head_dim=32, initializer_range=0.1),
    # silu, with biases in attention
    "qwen2": Qwen2Config(**GATED, initializer_range=0.3),
    # plain; NewGELU; the last projection is stored transposed
    "gpt2": GPT2Config(
        **COMMON, n_layer=2, n_embd=128, n_head=4, n_positions=256, initializer_range=0.3
    ),
    # plain; ReLU; no module of its own, so that the site is the layer
    "opt": OPTConfig(
        **COMMON,
        num_hidden_layers=2,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=192,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.3,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family, llama, tmp_path, monkeypatch):
    made = tiny.make(tmp_path, FAMILIES[family])
    monkeypatch.setenv("LAPEFAST_EDITS", str(made.edit_file))
    asks = asked(2, 20)
    expected = [made.expected(*ask) for ask in asks]
    assert expected.count(made.expected(asks[0][0], None)) < len(tiny.NAMES)
    with engine(made.path) as llm:
        assert answers(llm, asks) == expected
