from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from lapefast.errors import InputError
from lapefast.models.sites import Site
from lapefast.profiles import Profile

SITES = [Site("layers.0.mlp", 3, "SiLU"), Site("layers.1.mlp", 4, "SiLU")]


def make(sites=SITES, labels=("en", "中文")):
    counts = {s.name: torch.arange(len(labels) * s.width).view(-1, s.width) for s in sites}
    sums = {name: count.double() / 3 for name, count in counts.items()}
    statistics = {"counts": counts, "sums": sums}
    tokens = {site.stack: torch.tensor([100, 200])[: len(labels)] for site in sites}
    metadata = {"fingerprint": "f" * 64, "threshold": 0.0, "versions": {"torch": "2", "a": "1"}}
    return Profile(labels, sites, tokens, statistics, metadata)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "profile.safetensors"
    make().save(path)
    return path


def split(data):
    """The header of a profile file, and its tensors' bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def seal(header, tensors):
    """A file with a right checksum, as a program with an error would write it."""
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header).encode()
    blank = len(text).to_bytes(8, "little") + text
    checksum = hashlib.sha256(blank + tensors).hexdigest()
    return blank.replace(b"0" * 64, checksum.encode(), 1) + tensors


def test_a_loaded_profile_says_what_the_saved_one_said(saved):
    profile, loaded = make(), Profile.load(saved)
    assert loaded.labels == profile.labels
    assert loaded.site_info == profile.site_info
    assert loaded.metadata == profile.metadata
    assert loaded.tokens.tolist() == [100, 200]
    for name in ("counts", "sums"):
        for site in profile.sites:
            assert torch.equal(loaded.statistics[name][site], profile.statistics[name][site])


def test_tokens_are_kept_per_stack(tmp_path):
    sites = [Site("encoder.0", 3, "ReLU", "encoder"), Site("decoder.0", 3, "ReLU", calls=2)]
    profile = make(sites)
    profile.stack_tokens["decoder"] = torch.tensor([50, 60])
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    assert loaded.tokens.tolist() == [100, 200]
    assert loaded.site_tokens("decoder.0").tolist() == [100, 120]


def test_the_same_profile_gives_the_same_bytes(saved, tmp_path):
    Profile.load(saved).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_the_file_is_a_safetensors_file_like_any_other(saved):
    tensors = safetensors.torch.load_file(saved)
    assert tensors["tokens"].tolist() == [100, 200]
    assert torch.equal(tensors["counts/layers.1.mlp"], make().counts["layers.1.mlp"])
    with safetensors.safe_open(saved, "pt") as file:
        assert file.metadata()["format"] == "lapefast profile"
        assert file.metadata()["version"] == "1"


def test_tensors_that_are_views_are_written_as_they_look(tmp_path):
    counts = {"a": torch.arange(6).view(3, 2).T}
    tokens = {"decoder": torch.tensor([9, 9])}
    Profile(["en", "zh"], [Site("a", 3, "SiLU")], tokens, {"counts": counts}).save(tmp_path / "p")
    assert Profile.load(tmp_path / "p").counts["a"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_one_flipped_bit_anywhere_is_found(saved):
    data = saved.read_bytes()
    choose = random.Random(0)
    for position in range(len(data)):
        bits = range(8) if position < 8 else [choose.randrange(8)]
        for bit in bits:
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            saved.write_bytes(broken)
            with pytest.raises(InputError):
                Profile.load(saved)


def test_a_file_cut_short_anywhere_is_refused(saved):
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        with pytest.raises(InputError, match="cut short"):
            Profile.load(saved)


def test_a_file_with_something_after_its_end_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0" * 8)
    with pytest.raises(InputError, match="checksum"):
        Profile.load(saved)


def test_another_format_version_is_named(saved):
    header, tensors = split(saved.read_bytes())
    header["__metadata__"]["version"] = "2"
    saved.write_bytes(seal(header, tensors))
    with pytest.raises(InputError, match="format version 2, but this lapefast reads version 1"):
        Profile.load(saved)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"some text that is not a profile",
        b"\xff" * 200,
        (2).to_bytes(8, "little") + b"[]",
        (20_000).to_bytes(8, "little") + b"[" * 20_000,
        safetensors.torch.save({"x": torch.zeros(2)}),
        safetensors.torch.save({"x": torch.zeros(2)}, {"format": "pt"}),
    ],
    ids=["empty", "text", "bytes", "list", "deep", "safetensors", "with metadata"],
)
def test_what_is_no_profile_is_refused(tmp_path, data):
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(InputError, match=r"cannot load .*p: it is not a profile"):
        Profile.load(tmp_path / "p")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the profile .*absent"):
        Profile.load(tmp_path / "absent")


def rewritten(saved, change):
    """Change what the file says and its tensors, then seal it again."""
    header, _ = split(saved.read_bytes())
    about = json.loads(header["__metadata__"]["profile"])
    tensors = safetensors.torch.load_file(saved)
    change(about, tensors)
    metadata = {**header["__metadata__"], "profile": json.dumps(about)}
    header, data = split(safetensors.torch.save(tensors, metadata))
    saved.write_bytes(seal(header, data))


@pytest.mark.skipif(
    sys.platform != "linux", reason="/proc/self/mem, which fails when read, is there on Linux alone"
)
def test_a_file_that_opens_and_cannot_be_read_is_said():
    # Nothing is mapped at address 0, which is the first byte of this.
    message = r"cannot be read to its end \(Input/output error\); copy it anew"
    with pytest.raises(InputError, match=message):
        Profile.load("/proc/self/mem")


def test_rewriting_without_a_change_loads(saved):
    rewritten(saved, lambda about, tensors: None)
    assert Profile.load(saved).labels == ["en", "中文"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, tensors: tensors.pop("tokens"), "lacks the entry 'tokens'"),
        (lambda about, tensors: tensors.pop("sums/layers.1.mlp"), "lacks the entry 'sums/layers.1"),
        (lambda about, tensors: about.pop("labels"), "lacks the entry 'labels'"),
        (lambda about, tensors: about.pop("metadata"), "lacks the entry 'metadata'"),
        (lambda about, tensors: about["sites"][0].pop("width"), "inconsistent"),
        (lambda about, tensors: about["sites"][0].update(experts=8), "inconsistent"),
        (lambda about, tensors: about.update(labels=5), "inconsistent"),
        (lambda about, tensors: about.update(metadata=[1]), "inconsistent"),
        (lambda about, tensors: about.update(sites=[]), "unknown entries|needs sites"),
        (lambda about, tensors: about.update(statistics=["counts"]), "unknown entries, sums"),
        (lambda about, tensors: about.update(labels=["en"]), r"\[labels\] = \[1\]"),
        (lambda about, tensors: about["sites"][0].update(width=4), r"\[2, 4\], got .* \[2, 3\]"),
        (lambda about, tensors: tensors.update(extra=torch.zeros(1)), "unknown entries, extra"),
        (
            lambda about, tensors: tensors["counts/layers.0.mlp"].neg_(),
            "layers.0.mlp must not be negative",
        ),
        (
            lambda about, tensors: tensors["counts/layers.0.mlp"].add_(1000),
            "layers.0.mlp must not exceed",
        ),
        (
            lambda about, tensors: tensors.update({"counts/layers.0.mlp": torch.zeros(2, 3)}),
            "must be torch.int64",
        ),
        (
            lambda about, tensors: tensors["sums/layers.0.mlp"].fill_(torch.nan),
            "sums of site layers.0.mlp must be finite",
        ),
    ],
)
def test_an_inconsistent_file_is_refused(saved, change, message):
    rewritten(saved, change)
    with pytest.raises(InputError, match=message):
        Profile.load(saved)


def test_a_disk_that_fills_leaves_no_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*p\.safetensors"):
            make().save(tmp_path / "p.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_profile_that_was_there(saved, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left on device"):
        make(labels=("fr",)).save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
