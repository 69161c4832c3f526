"""The commands on a mixture of experts: a tiny saved one, with the demo's tokenizer and text."""

from __future__ import annotations

import json

import pytest
import torch
from mixtures import WIDTH, by_name, needs_5
from transformers import MixtralConfig, MixtralForCausalLM

import lapefast as lf

pytestmark = needs_5

EXPERTS = ["layers.0.mlp.experts", "layers.1.mlp.experts"]


@pytest.fixture(scope="module")
def directory(made, tmp_path_factory):
    """The mixture, saved with the tokenizer, and a profile of it."""
    path = tmp_path_factory.mktemp("mixture")
    options = by_name("MixtralForCausalLM").options
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(
            **options,
            vocab_size=len(made.tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).save_pretrained(path)
    made.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def profile(directory, made, lapefast):
    path = directory / "p.safetensors"
    if not path.exists():
        corpora = [f"--corpus={label}={made.train[label]}" for label in ("en", "zh", "ja")]
        more = ["--seq-len", 32, "--max-tokens", 512, "--threads", 1, "-o", path]
        result = lapefast("profile", directory, *corpora, *more)
        assert result.code == 0, result.err
    return path


def test_a_profile_of_a_mixture_is_written_and_shown(profile, lapefast):
    saved = lf.Profile.load(profile)
    assert saved.sites == EXPERTS
    assert saved.counts[EXPERTS[0]].shape == (3, 4, WIDTH)
    for site in EXPERTS:
        assert saved.routed[site].sum(1).tolist() == [1024] * 3
    shown = lapefast("info", profile)
    assert shown.code == 0, shown.err
    assert f"Profile of 2 sites, {2 * 4 * WIDTH} neurons" in shown.out
    said = f"experts_implementation {saved.metadata['experts_implementation']}"
    assert said in " ".join(shown.out.split())


@pytest.mark.parametrize("over", ["routed", "all"])
def test_lape_is_asked_for_by_the_tokens_it_is_over(profile, lapefast, tmp_path, over):
    rates = {"top_rate": 0.3, "filter_rate": 0.5, "activation_bar_ratio": 0.5}
    options = [f"--{name.replace('_', '-')}={rate}" for name, rate in rates.items()]
    out = tmp_path / "n.json"
    result = lapefast("identify", profile, *options, "--over", over, "-o", out)
    assert result.code == 0, result.err
    expected = lf.detect.lape(lf.Profile.load(profile), **rates, over=over)
    assert dict(lf.NeuronSets.load(out)) == dict(expected)
    assert json.loads(out.read_text())["sites"][0] == {
        "name": EXPERTS[0], "width": 4 * WIDTH, "experts": 4,
    }  # fmt: skip
    assert lapefast("info", out).code == 0


def test_experts_neurons_are_evaluated_and_steered_by_commands(
    profile, directory, made, lapefast, tmp_path
):
    rates = ["--top-rate=0.3", "--filter-rate=0.5", "--activation-bar-ratio=0.5"]
    neurons = tmp_path / "n.json"
    assert lapefast("identify", profile, *rates, "-o", neurons).code == 0
    corpora = [f"--corpus={label}={made.valid[label]}" for label in ("en", "zh", "ja")]
    text = ["--seq-len", 32, "--max-tokens", 128, "--threads", 1]
    given = ["--neurons", neurons, *corpora, *text, "-o", tmp_path / "m.json"]
    result = lapefast("evaluate", directory, *given, "--random-sets", 1)
    assert result.code == 0, result.err
    generate = ["--prompt", "a", "--neurons", neurons, "--deactivate", "en", "--activate", "zh"]
    more = ["--profile", profile, "--max-new-tokens", 3, "--threads", 1]
    result = lapefast("generate", directory, *generate, *more)
    assert result.code == 0, result.err
    report = ["--profile", profile, "--neurons", neurons, "-o", tmp_path / "r.html"]
    result = lapefast("report", *report)
    assert result.code == 0, result.err
