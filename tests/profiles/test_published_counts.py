from __future__ import annotations

import os

import pytest
import torch

import lapefast.models
from lapefast.detect import lape
from lapefast.errors import InputError
from lapefast.models.sites import Site
from lapefast.profiles import Profile

SITES = [Site("layers.0.mlp", 3, "SiLU"), Site("layers.1.mlp", 3, "SiLU")]


def make(tokens=(100, 200), sites=SITES, model="org/some-model"):
    counts = {
        site.name: torch.arange(2 * site.width).view(2, -1) + 10 * layer
        for layer, site in enumerate(sites)
    }
    stacks = {site.stack: torch.tensor(tokens) for site in sites}
    return Profile(["en", "zh"], sites, stacks, {"counts": counts}, {"model": model})


def write(path, n=10, over_zero=None, **kwargs):
    content = {"n": n, "over_zero": torch.ones(2, 3, dtype=torch.int32)}
    torch.save(content if over_zero is None else {"n": n, "over_zero": over_zero}, path, **kwargs)
    return path


def test_one_file_per_label_is_written_under_the_published_name(tmp_path):
    paths = make().save_published(tmp_path)
    names = ["activation.en.train.some-model", "activation.zh.train.some-model"]
    assert [os.path.basename(path) for path in paths.values()] == sorted(os.listdir(tmp_path))
    assert sorted(os.listdir(tmp_path)) == names
    content = torch.load(paths["zh"], weights_only=True)
    assert content["n"] == 200
    assert type(content["n"]) is int
    assert content["over_zero"].dtype == torch.int32
    assert content["over_zero"].tolist() == [[3, 4, 5], [13, 14, 15]]


def test_the_names_follow_a_template(tmp_path):
    paths = make().save_published(tmp_path / "{label}.counts")
    assert paths == {label: str(tmp_path / f"{label}.counts") for label in ("en", "zh")}
    assert sorted(os.listdir(tmp_path)) == ["en.counts", "zh.counts"]


def test_written_files_are_read_back_by_position(tmp_path):
    profile = make()
    loaded = Profile.from_published(profile.save_published(tmp_path))
    assert loaded.positional
    assert loaded.labels == ["en", "zh"]
    assert loaded.tokens.tolist() == [100, 200]
    assert torch.equal(loaded.published_counts(), profile.published_counts())
    with pytest.raises(InputError, match="no sums"):
        loaded.means("en")


def test_neurons_of_a_profile_without_names_are_bound_later(tmp_path):
    loaded = Profile.from_published(make().save_published(tmp_path))
    neurons = lape(loaded, top_rate=0.5, filter_rate=0.5, activation_bar_ratio=0.5)
    assert neurons.layout.positional
    assert neurons.widths == {0: 3, 1: 3}


def test_a_model_names_the_sites(tmp_path, monkeypatch):
    monkeypatch.setattr(lapefast.models, "find_sites", lambda model: SITES, raising=False)
    monkeypatch.setattr(lapefast.models, "fingerprint", lambda model: "f" * 64, raising=False)
    profile = make()
    paths = profile.save_published(tmp_path)
    loaded = Profile.from_published(paths, model=torch.nn.Module())
    assert loaded.sites == profile.sites
    assert loaded.fingerprint == "f" * 64
    write(paths["en"], over_zero=torch.ones(3, 3, dtype=torch.int32))
    with pytest.raises(InputError, match="3 layers of 3 neurons, but the model has 2 sites"):
        Profile.from_published({"en": paths["en"]}, model=torch.nn.Module())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_torch_formats_and_integer_widths_are_read(tmp_path, zipped, dtype):
    path = write(
        tmp_path / "x",
        n=torch.tensor(10),
        over_zero=torch.ones(2, 3, dtype=dtype),
        _use_new_zipfile_serialization=zipped,
    )
    loaded = Profile.from_published({"en": path})
    assert loaded.tokens.tolist() == [10]
    assert loaded.counts["1"].tolist() == [[1, 1, 1]]


def test_counts_that_do_not_fit_int32_are_refused_and_not_wrapped(tmp_path):
    profile = make(tokens=(2**40, 2**40))
    profile.counts["layers.0.mlp"][0, 0] = 2**31 - 1
    profile.save_published(tmp_path)
    profile.counts["layers.0.mlp"][0, 0] = 2**31
    with pytest.raises(InputError, match="a count here is 2147483648, above 2147483647"):
        profile.save_published(tmp_path / "{label}")
    assert len(os.listdir(tmp_path)) == 2


def test_widths_or_tokens_that_differ_between_sites_are_refused(tmp_path):
    with pytest.raises(InputError, match="widths from 3 to 4"):
        make(sites=[SITES[0], Site("b", 4, "SiLU")]).save_published(tmp_path)
    with pytest.raises(InputError, match="sites saw different numbers"):
        make(sites=[SITES[0], Site("b", 3, "SiLU", calls=2)]).save_published(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold a dict with n and over_zero"),
        ({"n": 1}, "must hold a dict with n and over_zero"),
        ({"n": 1.5, "over_zero": torch.ones(1, 1, dtype=torch.int32)}, "n of the count file"),
        ({"n": -1, "over_zero": torch.ones(1, 1, dtype=torch.int32)}, "n of the count file"),
        ({"n": 2**70, "over_zero": torch.ones(1, 1, dtype=torch.int32)}, "n of the count file"),
        ({"n": 1, "over_zero": [[1]]}, r"int32 \[layers, neurons\], got list"),
        ({"n": 1, "over_zero": torch.ones(1, 1)}, "got torch.float32"),
        ({"n": 1, "over_zero": torch.ones(2, dtype=torch.int32)}, r"got torch.int32 \[2\]"),
        ({"n": 1, "over_zero": torch.full((1, 1), 2)}, "between 0 and n = 1"),
        ({"n": 1, "over_zero": torch.full((1, 1), -1)}, "between 0 and n = 1"),
        ({"n": 1, "over_zero": torch.ones(0, 3, dtype=torch.int32)}, "or there are none"),
        ({"n": "1", "over_zero": torch.full((1, 1), 1)}, "tensors, lists, dicts and numbers"),
    ],
)
def test_other_content_in_a_count_file_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x")
    with pytest.raises(InputError, match=message):
        Profile.from_published({"en": tmp_path / "x"})


def test_files_of_models_that_differ_and_no_files_are_refused(tmp_path):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", over_zero=torch.ones(2, 4, dtype=torch.int32))
    with pytest.raises(InputError, match=r"b holds \[2, 4\] layers by neurons where .*a holds"):
        Profile.from_published({"en": a, "zh": b})
    with pytest.raises(InputError, match="at least one"):
        Profile.from_published({})
    with pytest.raises(InputError, match="cannot read the count file"):
        Profile.from_published({"en": tmp_path / "absent"})
