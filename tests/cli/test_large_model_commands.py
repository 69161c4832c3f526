"""`lapefast profile` of models that one device would not hold, or only quantised."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from launch import torchrun

import lapefast as lf

LABELS = ("en", "zh")
RUN = ["--seq-len", 32, "--max-tokens", 2048, "--batch-size", 16, "--threads", 1]
PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
DISK = dict.fromkeys(PARTS, "cpu") | {"model.layers.0": "disk", "model.layers.1": "cpu"}


@pytest.fixture(scope="module")
def command(made):
    """The arguments of a profile of the tiny model, and where its output goes."""
    corpora = [f"--corpus={label}={made.train[label]}" for label in LABELS]

    def arguments(path, *options, model=made.directory):
        return ["profile", model, *corpora, *RUN, *options, "-o", path]

    return arguments


@pytest.fixture(scope="module")
def wide(made, tmp_path_factory):
    """A model of layers as wide as bitsandbytes' blocks, with the tokenizer of the tiny one."""
    path = tmp_path_factory.mktemp("wide")
    config = copy.deepcopy(made.model.config)
    config.update({"hidden_size": 64, "head_dim": 32, "intermediate_size": 128})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        type(made.model)(config).save_pretrained(path)
    made.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def expected(made):
    corpora = {label: made.train[label] for label in LABELS}
    options = {"seq_len": 32, "max_tokens": 2048, "batch_size": 16, "progress": False}
    return lf.profile(made.model, corpora, made.tokenizer, **options)


@pytest.mark.parametrize("device_map", ["auto", json.dumps(DISK)], ids=["auto", "disk"])
def test_a_device_map_changes_no_bit(lapefast, command, expected, tmp_path, device_map):
    pytest.importorskip("accelerate", reason="accelerate is not installed; the extra test lifts it")
    path = tmp_path / "p.safetensors"
    assert lapefast(*command(path, "--device-map", device_map)).code == 0
    found = lf.Profile.load(path)
    assert found.fingerprint == expected.fingerprint
    for site in expected.sites:
        assert torch.equal(found.counts[site], expected.counts[site])
        assert torch.equal(found.sums[site], expected.sums[site])


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_model_is_profiled(lapefast, command, wide, tmp_path, bits):
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed; the extra test lifts it"
    )
    profiles = []
    for options in ([], ["--quantization", bits]):
        path = tmp_path / f"{len(options)}.safetensors"
        assert lapefast(*command(path, "--device", "cpu", *options, model=wide)).code == 0
        profiles.append(lf.Profile.load(path))
    expected, found = profiles
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.site_info == expected.site_info
    assert found.fingerprint != expected.fingerprint
    for site in expected.sites:
        # Of the same model, with coarser weights: another one's counts would differ more.
        shares = (found.counts[site] - expected.counts[site]).abs() / 2048
        assert 0 < shares.mean() < 0.1


def test_processes_that_share_a_model_write_one_profile(command, expected, tmp_path):
    path = tmp_path / "p.safetensors"
    done = torchrun("-m", "lapefast", *command(path, "--tensor-parallel"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == done.stdout.count("tokens") == 1
    assert done.stderr.count("Tensor parallelism over 2 processes") == 1
    found = lf.Profile.load(path)
    assert found.metadata["tensor_parallel"] == 2
    assert found.fingerprint == expected.fingerprint
    assert found.site_info == expected.site_info
    assert found.tokens.tolist() == expected.tokens.tolist()
    difference = sum(
        int((found.counts[site] - expected.counts[site]).abs().sum()) for site in expected.sites
    )
    neurons = sum(site.width for site in expected.site_info)
    assert difference <= 1e-6 * neurons * int(expected.tokens.sum())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "torchrun --nproc-per-node 2"),
        (["--device", "cpu"], "--device or --tensor-parallel"),
        (["--device-map", "auto"], "--device-map or --tensor-parallel"),
        (["--quantization", "8bit"], "--quantization or --tensor-parallel"),
    ],
)
def test_tensor_parallelism_that_can_not_be_is_refused(lapefast, command, tmp_path, options, said):
    path = tmp_path / "p.safetensors"
    result = lapefast(*command(path, "--tensor-parallel", *options))
    assert result.code == 2
    assert said in result.err.splitlines()[-1]
    assert not path.exists()
