"""The thread that reads ahead: bounded, heard, and gone when nobody listens."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lapefast.corpus import Corpus
from lapefast.corpus.background import Ahead

SECONDS = 60  # only a hang takes so long


def alive() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("lapefast corpus")]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_until_gone() -> None:
    for thread in alive():
        thread.join(SECONDS)
    assert not alive()


class Endless:
    """Documents for ever, counted; `closed` once the reader has let go."""

    def __init__(self) -> None:
        self.read = 0
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[str]:
        try:
            for self.read in itertools.count(1):
                yield f"document number {self.read}"
        finally:
            self.closed.set()


def test_the_reader_stays_a_bounded_number_of_documents_ahead(tokenizer: Any) -> None:
    documents = Endless()
    with Corpus("en", documents, tokenizer).rows(16) as rows:
        for taken in range(1, 20):
            next(rows)
            # A chunk comes from at most one batch of 512 documents here: one taken each time, four
            # waiting, one being offered, one being read; and the first 4,096 tokens, in one batch.
            assert documents.read <= 512 * (taken + 6)


def test_memory_does_not_grow_with_the_corpus(tokenizer: Any, tmp_path: Path) -> None:
    def peak(repeats: int) -> int:
        path = tmp_path / f"{repeats}.txt"
        path.write_text("the naïve año of language 模型 neurons\n" * repeats, "utf-8")
        tracemalloc.start()
        for chunk in Corpus("en", str(path), tokenizer).rows(128):
            del chunk
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2000)  # warms caches
    # Both are far longer than what is read ahead (a batch of 512 lines and 4 chunks). What is held
    # differs by where the thread happens to stand: at most one batch's tokens.
    assert peak(20_000) <= peak(5_000) + 512 * 40 * 48


@pytest.mark.parametrize("how", ["closed", "left", "dropped", "failed"])
def test_an_abandoned_iterator_ends_its_thread(how: str, tokenizer: Any) -> None:
    documents = Endless()
    rows = Corpus("en", documents, tokenizer).rows(16)
    next(rows)
    assert alive()
    if how == "closed":
        rows.close()
        rows.close()
        assert list(rows) == []
    elif how == "left":
        with rows:
            pass
    elif how == "failed":
        with pytest.raises(ZeroDivisionError), rows:
            raise ZeroDivisionError
    del rows
    gc.collect()
    assert documents.closed.wait(SECONDS)
    wait_until_gone()


def test_a_finished_iterator_has_no_thread(tokenizer: Any) -> None:
    rows = Corpus("en", ["a b c"] * 9, tokenizer).rows(4)
    list(rows)
    wait_until_gone()
    assert list(rows) == []


def test_what_the_source_raises_is_raised_as_it_is(tokenizer: Any) -> None:
    class Broken(Exception):
        pass

    error = Broken("the disk is gone")

    def texts() -> Iterator[str]:
        yield from ["some text"] * 2000
        raise error

    rows = Corpus("en", texts(), tokenizer).rows(16)
    with pytest.raises(Broken) as raised:
        list(rows)
    assert raised.value is error
    assert any(entry.name == "texts" for entry in raised.traceback)
    assert list(rows) == []
    wait_until_gone()


def test_a_keyboard_interrupt_in_the_source_is_passed_on() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    ahead = Ahead(items(), 2, "lapefast corpus test")
    assert next(ahead) == 1
    with pytest.raises(KeyboardInterrupt):
        next(ahead)


def test_an_interpreter_with_a_running_thread_exits_cleanly() -> None:
    code = (
        "import itertools\n"
        "from lapefast.corpus import Corpus\n"
        "ids = ([i % 7] * 100 for i in itertools.count())\n"
        "rows = Corpus('en', ids).rows(16)\n"
        "print(next(rows).shape[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "16", "")


def test_the_fraction_reaches_one(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("some words\n" * 5000)
    for source in (str(path), ["some words"] * 5000, torch.zeros(5000, dtype=torch.int64)):
        rows = Corpus("en", source, tokenizer).rows(16)
        fractions = [rows.fraction for _ in rows]
        assert fractions == sorted(fractions)
        assert rows.fraction == 1.0
    rows = Corpus("en", iter(["some words"] * 50), tokenizer).rows(16)
    list(rows)
    assert rows.fraction is None


@pytest.mark.parametrize("start", [0, 64])
def test_the_fraction_is_of_the_rows_taken_not_of_those_read_ahead(start: int) -> None:
    rows = Corpus("en", torch.zeros(256 * 16, dtype=torch.int64)).rows(16, start=start)
    wait_until(lambda: rows._made.ended)
    taken = start
    for some in rows:
        taken += len(some)
        assert rows.fraction == taken / 256


def test_the_fraction_of_a_long_text_is_not_of_what_was_read_ahead(tokenizer: Any) -> None:
    texts = ["some words"] * 400_000
    rows = Corpus("en", texts, tokenizer).rows(16)
    first = next(rows)
    wait_until(lambda: rows._made.rows >= 3 * len(first))
    tokens = len(tokenizer(texts[0])["input_ids"]) * len(texts)
    assert 0 < rows.fraction < 2 * first.numel() / tokens
    rows.close()


def test_the_fraction_never_becomes_less() -> None:
    with Corpus("en", torch.zeros(256 * 16, dtype=torch.int64)).rows(16) as rows:
        wait_until(lambda: rows._made.ended)
        next(rows)
        before = rows.fraction
        rows._made.rows *= 2  # as when what follows holds more than was expected
        assert rows.fraction == before > 0


def test_no_warning_about_long_sequences_and_no_other_one_lost(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        texts = ["many words in one document " * 50]
        list(Corpus("en", texts, tokenizer).rows(16))
        assert "longer than the specified maximum" not in caplog.text
        tokenizer(texts)
        assert "longer than the specified maximum" in caplog.text
    finally:
        logging.disable_propagation()
        logging.set_verbosity(level)
