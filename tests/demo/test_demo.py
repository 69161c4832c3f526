"""The demo model and its cache."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lapefast import demo
from lapefast.demo.model import Recipe, train_model
from lapefast.errors import InputError

TINY = Recipe(
    documents=60,
    valid_documents=5,
    vocabulary=300,
    width=16,
    neurons=32,
    layers=2,
    heads=2,
    context=64,
    seq_len=32,
    batch_size=7,
    steps=4,
    threads=1,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAPEFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(made: demo.Demo) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in made.model.parameters()])


def test_it_is_trained_once(cache, monkeypatch):
    first = demo.load(progress=False, recipe=TINY)
    monkeypatch.setattr("lapefast.demo.cache.train_model", None)
    second = demo.load(progress=False, recipe=TINY)
    assert torch.equal(weights(first), weights(second))
    assert first.train == second.train
    assert [path.parent.parent.parent for path in second.valid.values()] == [cache] * 7


def test_it_is_trained_once_for_two_who_come_together(cache, monkeypatch):
    trained = []

    def train(*arguments):
        trained.append(None)
        time.sleep(0.3)
        return train_model(*arguments)

    monkeypatch.setattr("lapefast.demo.cache.train_model", train)
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda _: demo.load(progress=False, recipe=TINY), range(2))
        first, second = map(weights, made)
    assert len(trained) == 1
    assert torch.equal(first, second)


def test_a_cache_that_cannot_be_locked_serves(cache, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert demo.load(progress=False, recipe=TINY).directory.is_dir()


def test_the_same_recipe_gives_the_same_model(cache, tmp_path, monkeypatch):
    first = demo.load(progress=False, recipe=TINY)
    monkeypatch.setenv("LAPEFAST_CACHE", str(tmp_path / "other"))
    torch.rand(1)
    again = demo.load(progress=False, recipe=TINY)
    assert torch.equal(weights(first), weights(again))


def test_another_recipe_is_another_model(cache):
    first = demo.load(progress=False, recipe=TINY)
    other = demo.load(progress=False, recipe=dataclasses.replace(TINY, seed=1))
    assert not torch.equal(weights(first), weights(other))
    assert first.directory != other.directory


@pytest.mark.parametrize(
    "name", ["complete.json", "model/model.safetensors", "corpus/fr.train.txt"]
)
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_entry_is_made_again(cache, name, damage):
    first = demo.load(progress=False, recipe=TINY)
    before = weights(first).clone()
    path = first.directory.parent / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    assert torch.equal(weights(demo.load(progress=False, recipe=TINY)), before)
    assert path.is_file()
    assert len(list(cache.iterdir())) == 1


def test_a_failure_leaves_nothing_behind(cache, monkeypatch):
    def fail(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr("lapefast.demo.cache.train_model", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        demo.load(progress=False, recipe=TINY)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAPEFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set LAPEFAST_CACHE"):
        demo.load(progress=False, recipe=TINY)


def test_an_entry_that_cannot_be_read_back_is_named(cache, monkeypatch):
    # The file's digest as it is written, and another when it is read: a disk that loses writes.
    digests = itertools.count()
    monkeypatch.setattr("lapefast.demo.cache._digest", lambda path: str(next(digests)))
    with pytest.raises(InputError, match=rf"was written to {cache}.* cannot be read from there"):
        demo.load(progress=False, recipe=TINY)


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LAPEFAST_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_directory() == tmp_path / "lapefast"


def test_random_numbers_and_threads_are_given_back(cache):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    demo.load(progress=False, recipe=dataclasses.replace(TINY, threads=threads + 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
