"""Loading models and tokenizers."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from lapefast.engines.transformers import Checkpoint, load_model, load_tokenizer
from lapefast.errors import InputError
from lapefast.models import fingerprint

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1}


@pytest.mark.parametrize(
    ("family", "options", "kind", "loaded"),
    [
        ("llama", SMALL, AutoModelForCausalLM, "LlamaForCausalLM"),
        ("llama", SMALL, AutoModel, "LlamaModel"),
        ("bert", SMALL, AutoModelForMaskedLM, "BertModel"),
        ("t5", T5, AutoModelForSeq2SeqLM, "T5ForConditionalGeneration"),
    ],
)
def test_a_model_is_loaded_with_the_head_that_was_saved(tmp_path, family, options, kind, loaded):
    model = kind.from_config(CONFIG_MAPPING[family](**options))
    model.save_pretrained(tmp_path)
    read = load_model(Checkpoint(str(tmp_path)), device="cpu")
    assert type(read).__name__ == loaded
    assert not read.training
    assert fingerprint(read) == fingerprint(model)


def test_the_dtype_is_the_checkpoints_or_as_asked(tmp_path):
    config = CONFIG_MAPPING["llama"](**SMALL)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert load_model(checkpoint, device="cpu").dtype == torch.bfloat16
    assert load_model(checkpoint, "float32", "cpu").dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, .*, got 'int8'"),
        ({"quantization": "2bit"}, "quantization must be one of 4bit, 8bit, got '2bit'"),
    ],
)
def test_a_precision_that_is_none_is_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        load_model(Checkpoint(str(tmp_path)), device="cpu", **options)


def test_weights_that_are_cut_short_are_refused(tmp_path):
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMALL)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(Checkpoint(str(tmp_path)), device="cpu")


def test_a_path_that_is_missing_is_no_name_on_the_hub():
    with pytest.raises(InputError, match="does not exist"):
        load_model(Checkpoint("./no/such/model"))


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    with pytest.raises(InputError, match="the hub cannot be reached"):
        load_model(Checkpoint("some/model"))


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_model(Checkpoint(str(tmp_path)))


def test_a_directory_without_a_tokenizer_is_said(tmp_path):
    CONFIG_MAPPING["llama"](**SMALL).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(Checkpoint(str(tmp_path)))
