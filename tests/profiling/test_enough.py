"""A pass that reads until enough was counted, stopped on its way; `test_until.py` has the rest."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import run_inputs
import torch
from test_survival import Breaks, Broken, assert_equal, profiled

from lapefast.detect import lape
from lapefast.errors import InputError, RunStopped
from lapefast.evaluate import UntilStable

ROWS = 24  # of the first label, in batches of two: 12; 4 of the second


class Enough:
    """Once the first label has so many tokens."""

    settings = "enough"

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.asked: list[list[int]] = []

    def __call__(self, profile) -> bool:
        self.asked.append([int(tokens) // 24 for tokens in profile.tokens])  # batches
        return int(profile.tokens[0]) >= self.tokens

    @property
    def metadata(self) -> dict:
        return {"asked": self.asked[-1]}


def test_an_iterator_that_was_left_early_is_known_by_its_start():
    rows = run_inputs.corpora(ROWS)
    lists = {label: of.tolist() for label, of in rows.items()}
    profile = profiled(run_inputs.model(), corpora=lists, seq_len=12, until=Enough(24 * 8))
    first = profile.metadata["corpora"][0]
    once = {label: iter(of.tolist()) for label, of in rows.items()}
    again = profiled(run_inputs.model(), corpora=once, seq_len=12, until=Enough(24 * 8))
    assert_equal(again, profile)
    assert again.metadata["corpora"][0]["identity"] == first["identity"]


@pytest.mark.parametrize("enough", [24 * 2, 24 * 8, 10**9])
def test_wherever_it_is_stopped_it_ends_where_an_undisturbed_run_ends(tmp_path, enough):
    model = run_inputs.model()
    expected = profiled(model, until=Enough(enough))
    batches = int(expected.tokens.sum()) // 24
    for number in range(batches):
        run = tmp_path / f"run-{number}"
        with Breaks(model, 2 + number, Broken()), pytest.raises(Broken):
            profiled(model, resume=run, until=Enough(enough))
        profile = profiled(model, resume=run, until=Enough(enough))
        assert_equal(profile, expected)
        assert profile.metadata == expected.metadata
        assert profiled(model, resume=run, until=Enough(enough)).metadata == expected.metadata


def test_a_question_that_a_kill_prevented_is_asked(tmp_path):
    model = run_inputs.model()

    class Killed(Enough):
        def __call__(self, profile):
            raise Broken  # after the state was saved, before it was asked

    expected = profiled(model, until=Enough(24))
    assert expected.tokens.tolist() == [24, 24]
    with pytest.raises(Broken):
        profiled(model, resume=tmp_path / "run", until=Killed(24))
    assert_equal(profiled(model, resume=tmp_path / "run", until=Enough(24)), expected)


def test_a_signal_while_it_is_asked_is_heard_at_once_and_it_is_asked_again(tmp_path):
    model = run_inputs.model()

    class Signalled(Enough):
        def __call__(self, profile):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    expected = profiled(model, until=Enough(24))
    with pytest.raises(RunStopped, match="48 tokens are counted and saved") as stopped:
        profiled(model, resume=tmp_path / "run", until=Signalled(24))
    assert stopped.value.signal == signal.SIGTERM
    assert_equal(profiled(model, resume=tmp_path / "run", until=Enough(24)), expected)


@pytest.mark.parametrize(
    "other", [None, UntilStable(0.9), UntilStable(0.8, partial(lape, top_rate=0.1))]
)
def test_another_question_is_refused(tmp_path, other):
    statistics = ("counts", "shard_counts")
    options = {"statistics": statistics, "resume": tmp_path / "run"}
    asked = UntilStable(0.8, partial(lape, top_rate=0.2))
    profiled(run_inputs.model(), until=asked, **options)
    with pytest.raises(InputError, match="until"):
        profiled(run_inputs.model(), until=other, **options)


def test_a_part_cannot_tell():
    with pytest.raises(InputError, match="leave out part or until"):
        profiled(run_inputs.model(), part=(1, 2), until=Enough(1))


def test_what_is_asked_may_refuse(tmp_path):
    def refusing(profile) -> bool:
        raise InputError("not with this profile")

    with pytest.raises(InputError, match="not with this profile"):
        profiled(run_inputs.model(), until=refusing, resume=tmp_path / "run")
    assert torch.is_grad_enabled()
