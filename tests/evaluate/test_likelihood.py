"""The likelihood of rows, against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from lapefast.errors import InputError
from lapefast.evaluate import likelihood as module
from lapefast.evaluate.likelihood import TokenLikelihood

VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": SMALL,
    "qwen3": SMALL,
    "gemma": SMALL,
    "gemma2": {**SMALL, "final_logit_softcapping": 0.2, "query_pre_attn_scalar": 8},
    "cohere": {**SMALL, "logit_scale": 0.3},
    "cohere2": {**SMALL, "logit_scale": 0.3},
    "granite": {**SMALL, "logits_scaling": 7.0},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt2": GPT2,
    "gptj": {**GPT2, "rotary_dim": 4},
    "bloom": {**SMALL, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "xglm": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 64,
    },
}


def causal(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def rows(count: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def own_nll(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))


# The softmax is taken in float32 over at most 96 values of magnitude below 8: each prediction errs
# by less than 16 units in the last place of a logit of 8, which is 1.6e-5 of a loss near ln 96.
RELATIVE = 1.6e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_that_of_the_models_own_logits(family, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 7 * VOCABULARY)
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 1)
    model, ids = causal(family), rows(3, 20)
    likelihood = TokenLikelihood(model)
    assert likelihood.in_chunks
    assert likelihood(ids) == pytest.approx(own_nll(model, ids), rel=RELATIVE)


def test_it_is_that_of_the_models_own_logits_in_bfloat16():
    model, ids = causal("gemma2", torch.bfloat16), rows(2, 20)
    # Logits are rounded to bfloat16 by the model itself, and in chunks of the same shape alike.
    assert TokenLikelihood(model)(ids[:1]) == pytest.approx(own_nll(model, ids[:1]), rel=RELATIVE)


def test_a_family_whose_head_does_not_run_alone_is_measured_row_by_row(monkeypatch):
    model, ids = causal("llama"), rows(3, 20)
    monkeypatch.setattr(TokenLikelihood, "_decoders", lambda _: [model.model.layers[0]])
    likelihood = TokenLikelihood(model)
    assert not likelihood.in_chunks
    assert likelihood(ids) == pytest.approx(own_nll(model, ids), rel=RELATIVE)


def test_no_logits_of_a_whole_row_are_made(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 7 * VOCABULARY)
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 1)
    model, seen = causal("llama"), []
    likelihood = TokenLikelihood(model)
    model.lm_head.register_forward_hook(
        lambda _, __, logits: seen.append(logits.shape[:-1].numel())
    )
    likelihood(rows(3, 20))
    assert max(seen, default=8) <= 7


def test_the_model_is_left_as_it_was():
    model = causal("llama").train()
    before = dict(model.model.__dict__)
    TokenLikelihood(model)(rows(1, 8))
    assert model.model.__dict__ == before
    assert all(one.training for one in model.modules())


def test_a_decoder_that_fails_is_put_back(monkeypatch):
    model = causal("llama")
    likelihood = TokenLikelihood(model)
    monkeypatch.setattr(model.lm_head, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        likelihood(rows(1, 8))
    assert "forward" not in model.model.__dict__


BERT = {**SMALL, "type_vocab_size": 1}


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_model_of_masked_tokens_is_refused(family):
    model = AutoModelForMaskedLM.from_config(CONFIG_MAPPING[family](**BERT))
    with pytest.raises(InputError, match="predicts masked tokens"):
        TokenLikelihood(model)


def test_a_head_on_an_encoder_that_sees_what_follows_is_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bert"](**BERT, is_decoder=False))
    with pytest.raises(InputError, match="sees the tokens that follow"):
        TokenLikelihood(model)


def test_an_encoder_made_a_decoder_is_measured():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bert"](**BERT, is_decoder=True)).eval()
    ids = rows(2, 20)
    assert TokenLikelihood(model)(ids) == pytest.approx(own_nll(model, ids), rel=RELATIVE)


def test_a_model_without_a_head_is_refused():
    model = AutoModel.from_config(CONFIG_MAPPING["llama"](**SMALL))
    with pytest.raises(InputError, match="no language-model head"):
        TokenLikelihood(model)


def test_an_encoder_decoder_is_refused():
    config = CONFIG_MAPPING["t5"](vocab_size=VOCABULARY, d_model=32, d_ff=48, num_layers=1)
    with pytest.raises(InputError, match="encoder-decoder"):
        TokenLikelihood(AutoModelForSeq2SeqLM.from_config(config))
