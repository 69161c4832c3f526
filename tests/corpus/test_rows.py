"""Rows equal a naive packing, whatever the texts come from."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from lapefast.corpus import Corpus, open_corpora

SEQ_LEN = 48


def naive(tokenizer: Any, documents: list[str], seq_len: int, **options: Any) -> torch.Tensor:
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, verbose=False, **options)["input_ids"]
    return torch.tensor(stream[: len(stream) // seq_len * seq_len]).reshape(-1, seq_len)


def stream_length(tokenizer: Any, documents: list[str]) -> int:
    return sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in documents)


def taken(corpus: Corpus, *arguments: Any, **options: Any) -> torch.Tensor:
    chunks = list(corpus.rows(*arguments, **options))
    assert all(chunk.dtype == torch.int64 and len(chunk) for chunk in chunks)
    return torch.cat(chunks)


def lines(documents: list[str]) -> bytes:
    return "".join(text + "\n" for text in documents).encode()


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def parquet(documents: list[str], path: Path) -> str:
    table = pa.table({"id": list(range(len(documents))), "text": documents})
    pyarrow.parquet.write_table(table, path, row_group_size=37)
    return str(path)


def directory(documents: list[str], path: Path) -> str:
    (path / "a" / ".hidden").mkdir(parents=True)
    (path / "a" / ".hidden" / "x.txt").write_text("must not be read")
    (path / "_SUCCESS").write_text("must not be read")
    write(path / "a" / "wiki_00", lines(documents[:100]))
    write(path / "a" / "wiki_01.jsonl.gz", gzip.compress(json_lines(documents[100:150])))
    write(path / "a" / "wiki_02", b"")
    parquet(documents[150:200], path / "b.parquet")
    write(path / "c.txt.xz", lzma.compress(lines(documents[200:])))
    return str(path)


def saved(documents: list[str], path: Path) -> str:
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(path)
    return str(path)


def saved_splits(documents: list[str], path: Path) -> str:
    train = datasets.Dataset.from_dict({"text": documents})
    test = datasets.Dataset.from_dict({"text": ["must not be read"]})
    datasets.DatasetDict(train=train, test=test).save_to_disk(path)
    return f"{path}::train"


def globbed(documents: list[str], path: Path) -> str:
    path.mkdir()
    write(path / "part-2.txt", lines(documents[50:]))
    write(path / "part-1.txt", lines(documents[:50]))
    write(path / "other.txt", b"must not be read\n")
    return str(path / "part-*.txt")


def loaded(documents: list[str], path: Path) -> str:
    path.mkdir()
    write(path / "train.jsonl", json_lines(documents))
    return f"{path}:default:train"


def stream(documents: list[str]) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in documents))


def one_line_of_zstd_frames(documents: list[str]) -> bytes:
    return zstd(lines(documents[:60])) + zstd(lines(documents[60:]))


SOURCES: dict[str, Callable[[list[str], Path], Any]] = {
    "text file": lambda d, p: write(p, lines(d)),
    "path object": lambda d, p: Path(write(p, lines(d))),
    "list of paths": lambda d, p: [Path(write(p, lines(d)))],
    "last line without its end": lambda d, p: write(p, lines(d)[:-1]),
    "CRLF": lambda d, p: write(p, lines(d).replace(b"\n", b"\r\n")),
    "byte order mark": lambda d, p: write(p, b"\xef\xbb\xbf" + lines(d)),
    "blank lines between": lambda d, p: write(p, lines(d).replace(b"\n", b"\n\n \t\n\r\n")),
    "gzip": lambda d, p: write(p.with_suffix(".txt.gz"), gzip.compress(lines(d))),
    "gzip in two members": lambda d, p: write(
        p.with_suffix(".gz"), gzip.compress(lines(d[:9])) + gzip.compress(lines(d[9:]))
    ),
    "gzip that doesn't say so": lambda d, p: write(p, gzip.compress(lines(d))),
    "bz2": lambda d, p: write(p.with_suffix(".bz2"), bz2.compress(lines(d))),
    "xz": lambda d, p: write(p.with_suffix(".xz"), lzma.compress(lines(d))),
    "lzma": lambda d, p: write(
        p.with_suffix(".lzma"), lzma.compress(lines(d), format=lzma.FORMAT_ALONE)
    ),
    "zstd": lambda d, p: write(p.with_suffix(".zst"), zstd(lines(d))),
    "zstd in two frames": lambda d, p: write(p.with_suffix(".zst"), one_line_of_zstd_frames(d)),
    "JSON lines": lambda d, p: write(p.with_suffix(".jsonl"), json_lines(d)),
    "JSON lines with blank ones": lambda d, p: write(
        p.with_suffix(".json"), json_lines(d).replace(b"\n", b"\r\n\n")
    ),
    "JSON lines, bz2": lambda d, p: write(p.with_suffix(".jsonl.bz2"), bz2.compress(json_lines(d))),
    "Parquet": lambda d, p: parquet(d, p.with_suffix(".parquet")),
    "Parquet that doesn't say so": parquet,
    "directory": directory,
    "glob": globbed,
    "saved data set": saved,
    "saved data set with splits": saved_splits,
    "data set by its loader": loaded,
    "Dataset": lambda d, p: datasets.Dataset.from_dict({"text": d, "n": [0] * len(d)}),
    "Dataset formatted for torch": lambda d, p: datasets.Dataset.from_dict({"text": d}).with_format(
        "torch"
    ),
    "Dataset, streaming": lambda d, p: datasets.Dataset.from_dict(
        {"text": d}
    ).to_iterable_dataset(),
    "IterableDataset of unknown columns": lambda d, p: stream(d),
    "dict of one split": lambda d, p: datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": d})
    ),
    "list": lambda d, p: d,
    "list with empty texts": lambda d, p: ["", *d[:5], "  \n", *d[5:]],
    "tuple": lambda d, p: tuple(d),
    "NumPy array of texts": lambda d, p: np.array(d, dtype=object),
    "iterator": lambda d, p: iter(d),
    "generator": lambda d, p: (text for text in d),
    "generator of mappings": lambda d, p: ({"text": text} for text in d),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("checked", [False, True], ids=["at once", "after a check"])
def test_every_source_gives_the_rows_of_a_naive_packing(
    kind: str, checked: bool, tokenizer: Any, documents: list[str], tmp_path: Path
) -> None:
    expected = naive(tokenizer, documents, SEQ_LEN)
    corpus = Corpus("en", SOURCES[kind](documents, tmp_path / "wiki.en"), tokenizer)
    if checked:
        corpus.check(SEQ_LEN)
    assert torch.equal(taken(corpus, SEQ_LEN), expected)
    report = corpus.report
    assert report.documents == len(documents)
    assert report.tokens == expected.numel()
    assert report.dropped == stream_length(tokenizer, documents) - expected.numel()
    assert report.rows == (0, len(expected))
    assert not report.capped
    plain = Corpus("de", documents, tokenizer)
    taken(plain, 2 * SEQ_LEN, 200)
    assert report.identity == plain.report.identity
    assert str(tmp_path) not in json.dumps(report.to_json())


def linked(path: Path) -> Path:
    """Two files under a directory, a link to one, and links to directories, one of them upwards."""
    (path / "top" / "own").mkdir(parents=True)
    (path / "elsewhere").mkdir()
    write(path / "top" / "own" / "b.txt", b"second\n")
    write(path / "elsewhere" / "c.txt", b"third\n")
    (path / "top" / "own" / "up").symlink_to(path / "top")
    (path / "top" / "a.txt").symlink_to(path / "top" / "own" / "b.txt")
    (path / "top" / "also").symlink_to(path / "top" / "own")
    (path / "top" / "far").symlink_to(path / "elsewhere")
    return path / "top"


@pytest.mark.parametrize(
    "source",
    [
        lambda top: top,
        lambda top: f"{top}/*",
        lambda top: [top / "a.txt", top / "own" / "b.txt", top.parent / "elsewhere" / "c.txt"],
        lambda top: [top / "a.txt", top / "far" / ".." / "elsewhere" / "c.txt", top / "far"],
    ],
    ids=["a directory", "a glob", "a link beside its target", "two spellings"],
)
def test_files_are_read_once_whatever_links_there_are(
    source: Callable[[Path], Any], tokenizer: Any, tmp_path: Path
) -> None:
    corpus = Corpus("en", source(linked(tmp_path)), tokenizer)
    expected = naive(tokenizer, ["second", "third"], 1)
    assert torch.equal(taken(corpus, 1), expected)
    assert corpus.report.documents == 2


def test_a_pipe_is_read_once(tokenizer: Any, documents: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=write, args=(tmp_path / "pipe", lines(documents)))
    writer.start()
    corpus = Corpus("en", tmp_path / "pipe", tokenizer)
    corpus.check(SEQ_LEN)
    assert torch.equal(taken(corpus, SEQ_LEN), naive(tokenizer, documents, SEQ_LEN))
    writer.join()


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("owner/name:20231101.en:test", ("owner/name", "20231101.en", "test")),
        ("owner/name::train[:10%]", ("owner/name", None, "train[:10%]")),
        ("name:en", ("name", "en", "train")),
        ("name:", ("name", None, "train")),
    ],
)
def test_a_name_with_colons_goes_to_the_loader_of_data_sets(
    source: str,
    arguments: tuple[str, str | None, str],
    tokenizer: Any,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(name: str, config: str | None, split: str, streaming: bool) -> Any:
        assert (name, config, split, streaming) == (*arguments, True)
        return stream(documents)

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = Corpus("en", source, tokenizer)
    assert torch.equal(taken(corpus, SEQ_LEN), naive(tokenizer, documents, SEQ_LEN))
    assert corpus.report.source == ":".join(part for part in source.split(":", 2) if part)


def test_special_tokens_can_be_left_out(tokenizer: Any, documents: list[str]) -> None:
    corpus = Corpus("en", documents, tokenizer, special_tokens=False)
    expected = naive(tokenizer, documents, SEQ_LEN, add_special_tokens=False)
    assert torch.equal(taken(corpus, SEQ_LEN), expected)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("line", ["a b", "c", " d", "e"]),
        ("blank-line", ["a b\nc", " d\ne"]),
        ("file", ["a b\nc\n\n \n d\ne\n\n"]),
    ],
)
def test_a_document_is_a_line_a_paragraph_or_a_file(
    document: str, expected: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.txt", b"a b\r\nc\r\n\r\n \r\n d\r\ne\r\n\r\n")
    corpus = Corpus("en", path, tokenizer, document=document)
    assert torch.equal(taken(corpus, 2), naive(tokenizer, expected, 2))
    assert corpus.report.documents == len(expected)


def test_a_carriage_return_alone_does_not_end_a_line(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", b"one\rtwo\nthree\r")
    corpus = Corpus("en", path, tokenizer)
    assert torch.equal(taken(corpus, 1), naive(tokenizer, ["one\rtwo", "three\r"], 1))


@pytest.mark.parametrize("max_tokens", [SEQ_LEN, SEQ_LEN + 1, 10 * SEQ_LEN - 1, 10**9])
def test_max_tokens_is_rounded_down_to_whole_rows(
    max_tokens: int, tokenizer: Any, documents: list[str]
) -> None:
    expected = naive(tokenizer, documents, SEQ_LEN)[: max_tokens // SEQ_LEN]
    corpus = Corpus("en", documents, tokenizer)
    assert torch.equal(taken(corpus, SEQ_LEN, max_tokens), expected)
    report = corpus.report
    assert report.tokens == expected.numel()
    assert report.capped == (max_tokens < 10**9)
    if report.capped:
        needed = next(
            n
            for n in range(1, len(documents))
            if stream_length(tokenizer, documents[:n]) >= report.tokens
        )
        assert report.documents == needed
        assert report.dropped == 0


def test_rows_before_the_start_are_counted_and_not_handed_out(
    tokenizer: Any, documents: list[str]
) -> None:
    corpus = Corpus("en", documents, tokenizer)
    everything = taken(corpus, SEQ_LEN)
    whole = corpus.report
    assert torch.equal(taken(corpus, SEQ_LEN, start=7), everything[7:])
    assert corpus.report.rows == (7, len(everything))
    assert corpus.report.tokens == whole.tokens - 7 * SEQ_LEN
    assert corpus.report.documents == whole.documents


def blank_lines(documents: list[str]) -> list[str | None]:
    """The documents, with a text that is empty or blank, or none, before every third."""
    return [
        text
        for number, document in enumerate(documents)
        for text in (*[["", " \t", None][number % 9 // 3]][number % 3 :], document)
    ]


@pytest.mark.parametrize("kind", ["list", "lines", "JSON lines"])
@pytest.mark.parametrize("max_tokens", [SEQ_LEN, 5000, None])
def test_texts_that_are_empty_are_counted_up_to_the_last_row(
    kind: str, max_tokens: int | None, tokenizer: Any, documents: list[str], tmp_path: Path
) -> None:
    given = blank_lines(documents)
    source = {
        "list": lambda: given,
        "lines": lambda: write(tmp_path / "t.txt", lines([text or "" for text in given])),
        "JSON lines": lambda: write(tmp_path / "t.jsonl", json_lines(given)),
    }[kind]()
    corpus = Corpus("en", source, tokenizer, token_cache=tmp_path / "cache")
    for _ in range(2):  # from the text, and from the cache where the source can be kept
        taken(corpus, SEQ_LEN, max_tokens)
        read = corpus.report.documents
        expected = sum(number % 3 == 0 for number in range(read))
        assert 0 < read <= len(documents)
        assert corpus.report.empty == corpus.report.to_json()["empty"] == expected
    assert any((tmp_path / "cache").glob("*.npy")) == (kind != "list")
    if max_tokens != SEQ_LEN:
        whole = corpus.report
        taken(corpus, SEQ_LEN, max_tokens, start=2)
        assert corpus.report.empty == whole.empty
    assert len(list(corpus.documents())) == len(documents)
    assert corpus.empty == len(given) - len(documents)


def test_the_report_accounts_for_what_was_taken_so_far(
    tokenizer: Any, documents: list[str]
) -> None:
    corpus = Corpus("en", documents * 30, tokenizer)
    rows = corpus.rows(SEQ_LEN)
    count = len(next(rows)) + len(next(rows))
    rows.close()
    assert corpus.report.rows == (0, count)
    assert corpus.report.tokens == count * SEQ_LEN
    lengths = np.cumsum([len(tokenizer(t)["input_ids"]) for t in documents * 30])
    assert corpus.report.documents == np.searchsorted(lengths, count * SEQ_LEN) + 1


def test_a_text_is_known_again_by_its_start(tokenizer: Any, documents: list[str]) -> None:
    def identity(source: list[str], *arguments: int, **options: int) -> str:
        corpus = Corpus("en", source, tokenizer)
        taken(corpus, *arguments, **options)
        return corpus.report.identity

    first = identity(documents, 32, 320)
    assert identity(documents, 64, 64) == first
    assert identity(documents + ["one more"], 32, start=10) == first
    assert identity(documents[1:], 32, 320) != first


IDS = np.arange(1000) % 500


@pytest.mark.parametrize(
    "ids",
    [
        torch.from_numpy(IDS),
        torch.from_numpy(IDS).to(torch.int32),
        torch.from_numpy(np.stack([IDS, IDS], 1))[:, 0],
        IDS.astype(np.uint16),
        IDS.tolist(),
        [IDS[:10].tolist(), [], IDS[10:500].tolist(), IDS[500:].tolist()],
        [torch.from_numpy(IDS[:777]), IDS[777:]],
        datasets.Dataset.from_dict({"input_ids": [IDS[:3].tolist(), IDS[3:].tolist()]}),
        iter([{"input_ids": IDS}]),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_ready_token_ids_are_cut_into_rows(ids: Any) -> None:
    corpus = Corpus("en", ids, vocab_size=500)
    corpus.check(64)
    assert torch.equal(taken(corpus, 64), torch.from_numpy(IDS[: 15 * 64].reshape(-1, 64)))
    assert (corpus.report.tokens, corpus.report.dropped) == (960, 40)


def test_token_ids_in_rows_keep_their_rows() -> None:
    ids = torch.randint(0, 500, (41, 24))
    corpus = Corpus("en", ids)
    assert corpus.row_length == 24
    assert torch.equal(taken(corpus), ids)
    assert torch.equal(taken(corpus, 24, 250), ids[:10])
    features = datasets.Features(
        {"input_ids": datasets.Sequence(datasets.Value("int32"), length=24)}
    )
    packed = datasets.Dataset.from_dict({"input_ids": ids.tolist()}, features=features)
    assert torch.equal(taken(Corpus("en", packed)), ids)


def test_token_ids_come_from_files_too(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS.reshape(10, 100).astype(np.uint16))
    torch.save(torch.from_numpy(IDS), tmp_path / "ids.pt")
    expected = torch.from_numpy(IDS.reshape(10, 100))
    assert torch.equal(taken(Corpus("en", str(tmp_path / "ids.npy"))), expected)
    assert torch.equal(taken(Corpus("en", tmp_path / "ids.pt"), 100), expected)
    line = json.dumps({"text": "unread", "input_ids": IDS.tolist()}).encode()
    assert torch.equal(taken(Corpus("en", write(tmp_path / "i.jsonl", line)), 100), expected)


def test_where_there_are_texts_and_ids_the_tokenizer_decides(tokenizer: Any) -> None:
    both = datasets.Dataset.from_dict({"text": ["a b c d"], "input_ids": [[7, 8]]})
    assert torch.equal(taken(Corpus("en", both, tokenizer), 1), naive(tokenizer, ["a b c d"], 1))
    assert taken(Corpus("en", both), 1).flatten().tolist() == [7, 8]


def test_another_field_can_be_named(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", b'{"text": 5, "content": "a b"}\n{"content": "c"}')
    corpus = Corpus("en", path, tokenizer, field="content")
    assert torch.equal(taken(corpus, 1), naive(tokenizer, ["a b", "c"], 1))


def test_two_passes_give_the_same_rows(tokenizer: Any, documents: list[str]) -> None:
    corpora = open_corpora({"en": documents, "zh": documents[::-1]}, tokenizer, seq_len=SEQ_LEN)
    for corpus in corpora:
        assert torch.equal(taken(corpus, SEQ_LEN), taken(corpus, SEQ_LEN))
    assert [corpus.label for corpus in corpora] == ["en", "zh"]


def test_corpora_can_be_read_side_by_side(tokenizer: Any, documents: list[str]) -> None:
    expected = naive(tokenizer, documents, SEQ_LEN)
    rows = [Corpus(label, documents, tokenizer).rows(SEQ_LEN) for label in "abc"]
    for chunks in zip(*rows, strict=True):
        assert all(torch.equal(chunk, chunks[0]) for chunk in chunks)
    assert torch.equal(taken(Corpus("d", documents, tokenizer), SEQ_LEN), expected)
