"""Token ids that are kept on disk, and when they are read again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from lapefast.corpus import Corpus
from lapefast.errors import InputError

SEQ_LEN = 16


@pytest.fixture
def file(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "en.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per batch of documents that goes through the tokenizer."""
    from lapefast.corpus.tokens import Tokenisation

    batch, calls = Tokenisation._batch, []

    def counting(self: Tokenisation, texts: list[str], *empty: Any) -> Any:
        calls.append(len(texts))
        return batch(self, texts, *empty)

    monkeypatch.setattr(Tokenisation, "_batch", counting)
    return calls


def taken(corpus: Corpus, *arguments: Any, **options: Any) -> torch.Tensor:
    with corpus.rows(*arguments, **options) as rows:
        return torch.cat(list(rows))


@pytest.mark.parametrize("limit", [None, 40 * SEQ_LEN, 40 * SEQ_LEN + 5])
@pytest.mark.parametrize("start", [0, 7, 40])
def test_what_is_read_back_is_what_the_text_gives(
    file, cache, tokenizer, tokenised, limit, start
) -> None:
    plain = Corpus("en", str(file), tokenizer)
    expected = list(plain.rows(SEQ_LEN, limit, start=start))
    for _ in range(2):
        corpus = Corpus("en", str(file), tokenizer, token_cache=cache)
        rows = list(corpus.rows(SEQ_LEN, limit, start=start))
        assert [len(one) for one in rows] == [len(one) for one in expected]
        assert all(map(torch.equal, rows, expected))
        assert corpus.report == plain.report
    tokenised.clear()
    list(Corpus("en", str(file), tokenizer, token_cache=cache).rows(SEQ_LEN, limit))
    assert not tokenised


def test_what_is_whole_serves_every_limit_and_what_is_not_serves_its_own(
    file, cache, tokenizer, tokenised
) -> None:
    def read(limit: int | None) -> bool:
        """Whether the text was tokenised."""
        tokenised.clear()
        taken(Corpus("en", str(file), tokenizer, token_cache=cache), SEQ_LEN, limit)
        return bool(tokenised)

    assert [read(320), read(320), read(640), read(320)] == [True, False, True, False]
    assert [read(None), read(None), read(480)] == [True, False, False]


def test_a_text_that_is_not_read_to_its_end_is_not_kept(file, cache, tokenizer) -> None:
    rows = Corpus("en", str(file), tokenizer, token_cache=cache).rows(SEQ_LEN)
    next(rows)
    rows.close()
    del rows
    kept = [one.name for one in cache.iterdir() if one.suffix == ".json"]
    if kept:  # its end was read ahead
        assert taken(Corpus("en", str(file), tokenizer, token_cache=cache), SEQ_LEN).shape[0]
    assert not list(cache.glob("*.tmp"))


def test_a_text_that_became_shorter_than_where_it_goes_on_is_refused_each_time(
    file, cache, tokenizer
) -> None:
    corpus = Corpus("en", str(file), tokenizer, token_cache=cache)
    rows = len(taken(corpus, SEQ_LEN))
    for _ in range(2):
        with pytest.raises(
            InputError, match=f"only {rows} rows of {SEQ_LEN} in it, not {rows + 5}"
        ):
            taken(corpus, SEQ_LEN, start=rows + 5)


def test_filling_reads_what_a_pass_would(file, cache, tokenizer, tokenised) -> None:
    corpus = Corpus("en", str(file), tokenizer, token_cache=cache)
    corpus.fill_cache(SEQ_LEN, 320)
    tokenised.clear()
    corpus.fill_cache(SEQ_LEN, 320)
    assert torch.equal(
        taken(corpus, SEQ_LEN, 320), taken(Corpus("en", str(file), tokenizer), SEQ_LEN, 320)
    )
    assert len(tokenised) == 1  # the plain corpus's


@pytest.mark.parametrize(
    "change",
    [
        lambda file, options: file.write_text(file.read_text() + '\n{"text": "more"}'),
        lambda file, options: os.utime(file, ns=(1, 1)),
        lambda file, options: options.update(special_tokens=False),
        lambda file, options: options.update(document="file"),
        lambda file, options: options["tokenizer"].add_tokens(["language"]),
        lambda file, options: setattr(options["tokenizer"], "split_special_tokens", True),
    ],
    ids=["text", "time", "special tokens", "document", "tokenizer", "split special tokens"],
)
def test_what_changes_the_ids_is_read_anew(file, cache, vocabulary, tokenised, change) -> None:
    from transformers import PreTrainedTokenizerFast

    options = {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=vocabulary)}
    taken(Corpus("en", str(file), token_cache=cache, **options), SEQ_LEN)
    change(file, options)
    tokenised.clear()
    rows = taken(Corpus("en", str(file), token_cache=cache, **options), SEQ_LEN)
    assert tokenised
    assert torch.equal(rows, taken(Corpus("en", str(file), **options), SEQ_LEN))


@pytest.mark.parametrize("suffix", [".ids", ".npy", ".json"])
@pytest.mark.parametrize("harm", ["cut", "gone", "emptied"])
def test_a_damaged_entry_counts_as_absent(file, cache, tokenizer, tokenised, suffix, harm) -> None:
    expected = taken(Corpus("en", str(file), tokenizer, token_cache=cache), SEQ_LEN)
    entry = next(cache.glob(f"*{suffix}"))
    if harm == "gone":
        entry.unlink()
    else:
        entry.write_bytes(entry.read_bytes()[:-8] if harm == "cut" else b"")
    tokenised.clear()
    for read in (True, False):
        corpus = Corpus("en", str(file), tokenizer, token_cache=cache)
        tokenised.clear()
        assert torch.equal(taken(corpus, SEQ_LEN), expected)
        assert bool(tokenised) is read


def test_places_with_a_flipped_bit_count_as_absent(file, cache, tokenizer, tokenised) -> None:
    expected = taken(Corpus("en", str(file), tokenizer, token_cache=cache), SEQ_LEN)
    entry = next(cache.glob("*.npy"))
    written = entry.read_bytes()
    for position in range(128, len(written), 97):  # behind NumPy's header
        entry.write_bytes(flipped(written, position))
        tokenised.clear()
        corpus = Corpus("en", str(file), tokenizer, token_cache=cache)
        assert torch.equal(taken(corpus, SEQ_LEN), expected)
        assert tokenised


@pytest.mark.parametrize("start", [0, 4096])
def test_ids_with_a_flipped_bit_are_refused_when_they_are_read(cache, tmp_path, start) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(f'{{"input_ids": {[n % 50] * 1000}}}' for n in range(140)))
    expected = taken(Corpus("en", str(many), token_cache=cache), SEQ_LEN, start=start)
    entry = next(cache.glob("*.ids"))
    written = entry.read_bytes()
    read = lambda first: taken(  # noqa: E731
        Corpus("en", str(many), token_cache=cache), SEQ_LEN, start=first
    )
    for position in (4 * SEQ_LEN * start, len(written) - 4, 4 * 70000):
        entry.write_bytes(flipped(written, position))
        with pytest.raises(InputError, match=f"{entry.name} are damaged; remove that file"):
            read(start)
    assert read(8500).shape == expected[8500 - start :].shape  # the bit is in the chunk before
    entry.unlink()
    assert torch.equal(read(start), expected)


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_let_be(
    file, cache, tokenizer
) -> None:
    with Corpus("en", str(file), tokenizer, token_cache=cache).rows(SEQ_LEN) as rows:
        list(rows)
    for entry in cache.iterdir():
        if entry.suffix == ".ids":
            killed = cache / f".{entry.name}.0123.tmp"
            living = cache / f".{entry.name}.4567.tmp"
        entry.unlink()
    killed.write_bytes(b"1234")
    with open(living, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        taken(Corpus("en", str(file), tokenizer, token_cache=cache), SEQ_LEN)
        assert living.exists()
        assert not killed.exists()


def test_saved_data_sets_are_kept_and_lists_are_not(cache, tmp_path, tokenizer, documents) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(saved)
    expected = taken(Corpus("en", documents, tokenizer, token_cache=cache), SEQ_LEN)
    assert not cache.exists()
    for _ in range(2):
        corpus = Corpus("en", str(saved), tokenizer, token_cache=cache)
        assert torch.equal(taken(corpus, SEQ_LEN), expected)
    assert len(list(cache.glob("*.json"))) == 1


def test_a_cache_that_cannot_be_is_refused(file, tokenizer, tmp_path, monkeypatch) -> None:
    with pytest.raises(InputError, match="is no directory and cannot be made one: No such file"):
        Corpus("en", str(file), tokenizer, token_cache=tmp_path / "no" / "where")

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    corpus = Corpus("en", str(file), tokenizer, token_cache=tmp_path / "tokens")
    with pytest.raises(InputError, match="cannot be written: No space left on device; make room"):
        taken(corpus, SEQ_LEN)
    assert not list((tmp_path / "tokens").iterdir())
