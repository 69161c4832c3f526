"""What can't be used is refused in one sentence that names it."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import pickle
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from lapefast.corpus import (
    Corpus,
    open_corpora,
    parse_corpus_argument,
    parse_corpus_arguments,
)
from lapefast.errors import InputError

LINES = b"some text to read\n" * 2000
NOISE = random.Random(0).randbytes(999).hex().encode()  # so that 99 bytes hold less than a row


def refused(match: str) -> Any:
    return pytest.raises(InputError, match=match)


def put(path: Path, name: str, data: bytes) -> str:
    (path / name).write_bytes(data)
    return str(path / name)


def empty_directory(path: Path) -> str:
    (path / "nothing").mkdir()
    return str(path / "nothing")


def parquet(path: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pa.table(columns), path / "t.parquet")
    return str(path / "t.parquet")


def link_to_nothing(path: Path) -> str:
    (path / "texts").mkdir()
    (path / "texts" / "t.txt").symlink_to(path / "missing.txt")
    return str(path / "texts")


def saved(path: Path) -> str:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(path / "saved")
    return str(path / "saved")


def saved_splits(path: Path) -> str:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(path / "splits")
    return str(path / "splits")


def closed_generator() -> Iterator[str]:
    generator = (text for text in ["a", "b"])
    list(generator)
    return generator


AT_ONCE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing file": (lambda p: str(p / "no.txt"), "no.txt does not exist"),
    "missing path object": (lambda p: p / "no.txt", "no.txt does not exist"),
    "missing beside others": (lambda p: [Path(__file__), p / "no.txt"], "no.txt does not exist"),
    "glob without a match": (lambda p: str(p / "*.txt"), r"\*.txt matches no file"),
    "a text instead of a path": (lambda p: "Some text.\n" * 999, "given as a list"),
    "an address": (
        lambda p: "https://example.org/en.txt",
        "https://example.org/en.txt is an address, and texts are read from files alone; download",
    ),
    "an address of a bucket": (lambda p: "s3://bucket/en.txt", "s3://bucket/en.txt is an address"),
    "empty path": (lambda p: "", "path is empty"),
    "empty file": (lambda p: put(p, "t.txt", b""), "t.txt is empty"),
    "empty directory": (empty_directory, "nothing holds no files"),
    "empty tensor": (lambda p: torch.empty(0, dtype=torch.int64), "no token ids"),
    "float tensor": (lambda p: torch.rand(9), "must be integers, got torch.float32"),
    "bool tensor": (lambda p: torch.ones(9, dtype=torch.bool), "must be integers, got torch.bool"),
    "float array": (lambda p: np.ones((2, 2)), "must be integers, got float64"),
    "three dimensions": (lambda p: np.ones((2, 2, 2), dtype=int), r"got \[2, 2, 2\]"),
    "a scalar": (lambda p: torch.tensor(5), r"got \[\]"),
    "ids and texts in one list": (lambda p: [5, "text"], "must be integers"),
    "uneven ids": (lambda p: [5, [6]], "token ids only"),
    "names of files in a list": (lambda p: [__file__], "its first is the name of a file"),
    "a number": (lambda p: 17, "got int"),
    "nothing": (lambda p: None, "got NoneType"),
    "bytes": (lambda p: b"text", "got bytes"),
    "a set": (lambda p: {"a", "b"}, "got set"),
    "a mapping": (lambda p: {"input_ids": [1, 2]}, "got dict"),
    "a data frame": (lambda p: pandas.DataFrame({"text": ["a"]}), "got DataFrame"),
    "data set without the field": (
        lambda p: datasets.Dataset.from_dict({"content": ["a"], "id": [1]}),
        "no field 'text'; the fields found are: content, id",
    ),
    "splits to choose from": (saved_splits, "has the splits train, test"),
    "a split that isn't there": (lambda p: saved_splits(p) + "::valid", "the splits train, test"),
    "data set of a missing path": (lambda p: f"{p}/no/such:default:train", "does not exist"),
    "data set that can't be loaded": (lambda p: f"{p}:default:train", "cannot be loaded"),
    "a pickle as tensor": (
        lambda p: put(p, "t.pt", pickle.dumps(os.getcwd, 2)),
        "t.pt cannot be read as an array",
    ),
    "text as tensor": (lambda p: put(p, "t.npy", LINES), "t.npy cannot be read as an array"),
    "link to nothing": (link_to_nothing, "t.txt cannot be read: No such file"),
    "damaged data set": (
        lambda p: str(Path(put(p, "state.json", b"{")).parent),
        "cannot be read as a saved data set",
    ),
    "split of none": (lambda p: saved(p) + "::test", "saved was saved without splits, so test is"),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_it_is_refused_when_opened(case: str, tokenizer: Any, tmp_path: Path) -> None:
    make, match = AT_ONCE[case]
    source = make(tmp_path)
    with refused(rf"^label 'en': .*{match}") as raised:
        Corpus("en", source, tokenizer)
    assert "\n" not in str(raised.value).strip()


def test_a_directory_that_may_not_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "t.txt", b"text\n")
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with refused("closed cannot be read: Permission denied"):
        Corpus("en", tmp_path)


def test_a_dict_of_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"n": torch.arange(3)}, tmp_path / "t.pt")
    with refused("must hold one tensor of token ids, got dict"):
        Corpus("en", tmp_path / "t.pt")


AT_THE_START: dict[str, tuple[Callable[[Path], Any], str]] = {
    "blank lines only": (lambda p: put(p, "t.txt", b"\n \t\r\n\n"), "there is no text in it"),
    "byte order mark only": (lambda p: put(p, "t.txt", b"\xef\xbb\xbf"), "there is no text in it"),
    "empty list": (lambda p: [], "there is no text in it"),
    "list of empty texts": (lambda p: ["", None, " "], "there is no text in it"),
    "consumed generator": (lambda p: closed_generator(), "may have been consumed"),
    "too few tokens": (lambda p: ["one two", "three"], r"tokens in 2 documents .* one row of 100"),
    "binary": (
        lambda p: put(p, "t.bin", b"ab\ncd\0\1\2" * 50),
        "t.bin, line 2: not UTF-8 text, it looks like binary",
    ),
    "UTF-16": (
        lambda p: put(p, "t.txt", "some text\nand more".encode("utf-16")),
        "t.txt, line 1: not UTF-8 text, it looks like UTF-16",
    ),
    "Latin-1": (
        lambda p: put(p, "t.txt", b"ascii\n\nna\xefve\n"),
        "t.txt, line 3: not UTF-8 text .byte 0xef.",
    ),
    "cut within a character": (
        lambda p: put(p, "t.txt", "ok\n語".encode()[:-1]),
        "t.txt, line 2: not UTF-8",
    ),
    "a compressed array": (
        lambda p: put(p, "t.npy.gz", gzip.compress(b"\x93NUMPY")),
        "t.npy.gz must be given alone, not compressed or beside other files",
    ),
    "an array beside text": (
        lambda p: [Path(put(p, "t.npy", b"\x93NUMPY")), Path(put(p, "t.txt", LINES))],
        "t.npy must be given alone",
    ),
    "not JSON": (
        lambda p: put(p, "t.jsonl", b'{"text": "a"}\n{"text": \n'),
        "t.jsonl, line 2: not JSON",
    ),
    "JSON nested too deep": (lambda p: put(p, "t.jsonl", b"[" * 10**5), "line 1: not JSON"),
    "JSON array": (
        lambda p: put(p, "t.json", b'[{"text": "a"}]'),
        "t.json, line 1: each line must be one JSON object, got an array",
    ),
    "JSON without the field": (
        lambda p: put(p, "t.jsonl", b'{"text": "a"}\n\n{"title": 1, "body": 2}'),
        "t.jsonl, line 3: there is no field 'text'; the fields found are: title, body",
    ),
    "JSON with another type": (
        lambda p: put(p, "t.jsonl", b'{"text": 5}'),
        "t.jsonl, line 1: expected a text or a sequence of token ids, got int",
    ),
    "Parquet without the field": (
        lambda p: parquet(p, title=["a"], body=["b"]),
        "t.parquet: there is no field 'text'; the fields found are: title, body",
    ),
    "Parquet with another type": (lambda p: parquet(p, text=[None, 1.5]), "row 2: .* got float"),
    "not Parquet": (lambda p: put(p, "t.parquet", LINES), "t.parquet is not a Parquet file"),
    "cut short, gzip": (lambda p: put(p, "t.gz", gzip.compress(NOISE)[:99]), "t.gz cannot be read"),
    "cut short, bz2": (lambda p: put(p, "t.bz2", bz2.compress(NOISE)[:99]), "t.bz2 cannot be"),
    "cut short, xz": (lambda p: put(p, "t.xz", lzma.compress(NOISE)[:99]), "t.xz cannot be read"),
    "damaged zstd": (lambda p: put(p, "t.zst", b"\x28\xb5\x2f\xfd" + b"x" * 99), "t.zst cannot be"),
    "list of other things": (lambda p: ["a", 1.5], "<list of 2>, item 1: expected a text .* float"),
    "floats as token ids": (lambda p: [["a"], [0.5]], "item 0: expected a text or integer token"),
    "nested token ids": (lambda p: [[1, [2]]], "item 0: expected one sequence of token ids"),
    "mappings without the field": (lambda p: iter([{"b": 1}]), "item 0: there is no field 'text'"),
    "half a surrogate pair": (lambda p: ["a" * 9, "b\ud83d"], r"U\+D83D at character 1"),
    "negative ids": (
        lambda p: torch.tensor([5, 6, -1] * 99),
        r"token id -1 \(token 2\) is outside the",
    ),
    "ids too large": (
        lambda p: np.full((200, 100), 600),
        r"token id 600 \(token 0\) is outside the vocabulary of 600",
    ),
    "ids too large far behind": (
        lambda p: torch.tensor([0] * 10**6 + [600]),
        r"token id 600 \(token 1000000\)",
    ),
}


@pytest.mark.parametrize("case", AT_THE_START)
def test_it_is_refused_before_the_work_starts(case: str, tokenizer: Any, tmp_path: Path) -> None:
    make, match = AT_THE_START[case]
    good = ["some text to read"] * 100
    with refused(rf"^label 'zh': .*{match}"):
        open_corpora({"en": good, "zh": make(tmp_path)}, tokenizer, seq_len=100, vocab_size=600)


@pytest.mark.parametrize("case", AT_THE_START)
def test_it_is_refused_while_it_is_read(case: str, tokenizer: Any, tmp_path: Path) -> None:
    make, match = AT_THE_START[case]
    rows = Corpus("zh", make(tmp_path), tokenizer, vocab_size=600).rows(100)
    with refused(rf"^label 'zh': .*{match}") as raised:
        list(rows)
    assert "\n" not in str(raised.value)


def test_the_tokens_found_and_needed_are_named(tokenizer: Any) -> None:
    found = len(tokenizer("one two")["input_ids"])
    with refused(f"^label 'en': {found} tokens in 1 documents are too few for one row of 50;"):
        open_corpora({"en": ["one two"]}, tokenizer, seq_len=50)


def test_what_is_wrong_far_behind_is_refused_when_it_is_reached(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = put(tmp_path, "t.jsonl", b'{"text": "some text"}\n' * 5000 + b"oops\n")
    (corpus,) = open_corpora({"en": path}, tokenizer, seq_len=16)
    with refused("line 5001: not JSON"):
        list(corpus.rows(16))
    assert corpus.report.tokens > 0


def test_a_tokenizer_of_another_model_is_noticed(tokenizer: Any) -> None:
    with refused(r"^label 'en': token id \d+ .* is outside the vocabulary of 20"):
        open_corpora({"en": ["some text"] * 99}, tokenizer, seq_len=16, vocab_size=20)


@pytest.mark.parametrize("source", [["a text"], iter(["a text"])])
def test_texts_without_a_tokenizer_are_refused(source: Any) -> None:
    with refused("^label 'en': these are texts, which need a tokenizer"):
        open_corpora({"en": source})


def test_a_generator_is_read_once(tokenizer: Any) -> None:
    corpus = Corpus("en", (text for text in ["some text"] * 100), tokenizer)
    corpus.check(16)
    corpus.check(16)
    list(corpus.rows(16))
    for again in (lambda: corpus.check(16), lambda: list(corpus.rows(16))):
        with refused("<generator> was already consumed by an earlier pass"):
            again()


def test_one_iterator_for_two_labels_is_refused(tokenizer: Any) -> None:
    texts = iter(["some text"] * 100)
    with refused("labels 'en' and 'zh' share one iterator"):
        open_corpora({"en": texts, "zh": texts}, tokenizer)


def test_rows_of_another_length_are_refused() -> None:
    corpus = Corpus("en", torch.zeros(4, 24, dtype=torch.int64))
    with refused(r"keeps its rows of 24 token ids, but seq_len is 32"):
        corpus.rows(32)
    with refused("seq_len must be given"):
        Corpus("en", torch.zeros(24, dtype=torch.int64)).rows()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"seq_len": 64, "max_tokens": 1e6}, "max_tokens must be an integer, got 1000000.0"),
        ({"seq_len": 64, "max_tokens": 63}, "max_tokens=63 is less than one row of 64"),
        ({"seq_len": 64, "max_tokens": -1}, "max_tokens=-1 is less"),
        ({"seq_len": 64, "start": -1}, "start must be a row, 0 or more, got -1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, float], match: str, tokenizer: Any) -> None:
    with refused(match):
        Corpus("en", ["a"], tokenizer).rows(**options)


@pytest.mark.parametrize("label", ["", "  ", None, 3])
def test_a_label_must_say_something(label: Any) -> None:
    with refused("a label must be a non-empty string"):
        Corpus(label, [[1, 2]])


def test_bad_options_are_refused(tokenizer: Any) -> None:
    with refused("document must be one of line, file, blank-line, got 'page'"):
        Corpus("en", ["a"], tokenizer, document="page")
    with refused("tokenizer must be a Hugging Face tokenizer, got str"):
        Corpus("en", ["a"], "gpt2")
    with refused("corpora must map labels to sources, got list"):
        open_corpora([["a"]])  # type: ignore[arg-type]
    with refused("corpora is empty"):
        open_corpora({})
    with refused("there is no report before rows were taken"):
        _ = Corpus("en", ["a"], tokenizer).report


def test_an_unreadable_file_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, "t.txt", LINES)

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", denied)  # root may read anything
    with refused(re.escape(f"{path} cannot be read: Permission denied")):
        Corpus("en", path, tokenizer).check()


def test_a_corpus_argument_is_label_and_source() -> None:
    assert parse_corpus_argument("en=wiki.en.txt") == ("en", "wiki.en.txt")
    assert parse_corpus_argument("en=name:config:split") == ("en", "name:config:split")
    assert parse_corpus_argument("en=a=b.txt") == ("en", "a=b.txt")
    assert parse_corpus_arguments(["en=a", "zh=b"]) == {"en": "a", "zh": "b"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["wiki.txt"], "given as label=source, .* got 'wiki.txt'"),
        (["=wiki.txt"], "a label must be a non-empty string"),
        (["\ud800=wiki.txt"], r"must be strings without lone surrogates, got '\\ud800'"),
        (["en="], "label 'en': there is no source after the ="),
        (["en=a", "zh=b", "en=c"], "label 'en' is given twice, as a and c"),
    ],
)
def test_bad_corpus_arguments_are_refused(arguments: list[str], match: str) -> None:
    with refused(match):
        parse_corpus_arguments(arguments)


def test_a_saved_report_holds_json_only(tokenizer: Any, tmp_path: Path) -> None:
    corpus = Corpus("en", put(tmp_path, "t.txt", LINES), tokenizer)
    list(corpus.rows(16))
    assert json.loads(json.dumps(corpus.report.to_json()))["source"] == "t.txt"
