"""A tiny saved model with its tokenizer and text, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from lapefast import demo
from lapefast.cli import main
from lapefast.demo.model import Recipe


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> demo.Demo:
    """The demo in miniature."""
    recipe = Recipe(
        documents=150,
        valid_documents=20,
        vocabulary=300,
        width=16,
        neurons=64,
        layers=2,
        heads=2,
        context=64,
        seq_len=32,
        batch_size=7,
        steps=20,
        threads=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPEFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return demo.load(progress=False, recipe=recipe)


@pytest.fixture
def lapefast(capsys) -> Callable[..., Result]:
    """Runs a command line."""

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return Result(exit_.value.code or 0, *capsys.readouterr())

    return run
