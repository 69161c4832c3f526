"""Each request has its own edit, however the engine schedules it.

The oracle is the same model in transformers with plain hooks on its activations, in float32: tokens
must be equal, all of them.
"""

from __future__ import annotations

import pytest
import torch
from engines import answers, asking, engine
from tiny import NAMES, asked, prompts
from vllm.exceptions import VLLMValidationError

from lapefast.engines.vllm.edits import Serving
from lapefast.engines.vllm.served import Served


@pytest.fixture(scope="module")
def llm(llama):
    with engine(llama.path) as llm:
        yield llm


@pytest.fixture
def steps(monkeypatch):
    """The sets of each step's rows, as they are computed."""
    seen = []

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    original = Serving.index
    monkeypatch.setattr(Serving, "index", spy)
    return seen


def test_every_edit_changes_what_is_generated(llama):
    for prompt in prompts(4, 20):
        different = {tuple(llama.expected(prompt, name)) for name in NAMES}
        assert len(different) == len(NAMES)


def test_requests_with_different_edits_in_one_batch(llama, llm, steps):
    asks = asked(4, 20)
    assert answers(llm, asks) == [llama.expected(*ask) for ask in asks]
    # Rows of all five edits and of none went through the model together.
    assert any(set(sets.tolist()) == {-1, 0, 1, 2, 3, 4} for sets in steps)


def test_one_prompt_under_one_edit_after_the_other(llama, llm):
    prompt = prompts(1, 100, seed=1)[0]
    for name in [*NAMES, *NAMES]:
        assert answers(llm, [(prompt, name)]) == [llama.expected(prompt, name)], name


def test_cached_prefixes_serve_requests_of_the_same_edit_only(llama, llm):
    prompt = prompts(1, 100, seed=2)[0]

    def cached(name: str | None) -> int:
        return llm.generate(
            [{"prompt_token_ids": prompt}], [asking(name, 1)], use_tqdm=False
        )[0].num_cached_tokens  # fmt: skip

    for name in NAMES:
        assert cached(name) == 0, name
    for name in NAMES:
        # All whole blocks but what the last token is needed for.
        assert cached(name) == 96, name


def test_without_the_salt_these_tests_would_see_other_edits_keys_and_values(
    llama, llm, monkeypatch
):
    monkeypatch.setattr(Served, "salted", lambda self, chosen, salt: salt)
    prompt = prompts(1, 100, seed=11)[0]
    right = [answers(llm, [(prompt, name)]) == [llama.expected(prompt, name)] for name in NAMES]
    assert right == [True, False, False, False, False, False]
    llm.reset_prefix_cache()


def test_a_request_keeps_its_own_salt_beside_its_edit(llama, llm):
    prompt = prompts(1, 100, seed=3)[0]

    def cached(salt: str, name: str | None) -> int:
        asks = [{"prompt_token_ids": prompt, "cache_salt": salt}]
        return llm.generate(asks, [asking(name, 1)], use_tqdm=False)[0].num_cached_tokens

    assert [cached("a", "on"), cached("b", "on"), cached("a", None), cached("a", "off")] == [0] * 4
    assert [cached("a", "on"), cached("b", "on"), cached("a", None), cached("a", "off")] == [96] * 4


def test_long_prompts_that_go_through_in_parts(llama, llm, steps):
    asks = asked(1, 150, seed=4)
    assert answers(llm, asks) == [llama.expected(*ask) for ask in asks]
    # 900 tokens of prompts in steps of at most 64.
    assert all(len(sets) <= 64 for sets in steps)
    assert len(steps) > 900 // 64


def test_requests_that_join_and_leave_while_others_run(llama, llm):
    asks = asked(4, 30, seed=5)
    lengths = [3 + 2 * (number % 5) for number in range(len(asks))]
    waiting, finished = list(range(len(asks))), {}
    for step in range(500):
        if waiting and step % 2 == 0:
            number = waiting.pop(0)
            prompt, name = asks[number]
            request = {"prompt_token_ids": prompt}
            llm.llm_engine.add_request(str(number), request, asking(name, lengths[number]))
        for output in llm.llm_engine.step():
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
        if not waiting and not llm.llm_engine.has_unfinished_requests():
            break
    for number, ask in enumerate(asks):
        assert finished[number] == llama.expected(*ask)[: lengths[number]], ask


def test_rows_given_to_their_neighbours_are_noticed_by_these_tests(llama, llm, monkeypatch):
    original = Serving.index
    monkeypatch.setattr(Serving, "index", lambda *args: torch.roll(original(*args), 1))
    # One token each: in later steps a row is a whole request.
    asks = asked(1, 20, seed=8)
    got = answers(llm, asks)
    assert not any(answer == llama.expected(*ask) for answer, ask in zip(got, asks, strict=True))
    # What was cached now is wrong.
    llm.reset_prefix_cache()


def test_rows_of_no_request_have_no_edit(llama, llm):
    answers(llm, asked(1, 20, seed=9))
    model_runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    rows = model_runner._lapefast_edits
    assert rows.index.shape == (64,)
    assert bool((rows.index == -1).all())
    before = rows.fired.clone()
    model_runner._dummy_run(16)
    assert (rows.fired - before).tolist() == [[1, 16]] * 3


@pytest.mark.parametrize(
    "extra", [{"lapefast_edit": "om"}, {"lapefast_edit": 1}, {"lapefast_edits": "on"}]
)
def test_an_unknown_edit_is_refused_before_anything_runs(llm, extra):
    params = asking(None)
    params.extra_args = extra
    with pytest.raises(VLLMValidationError, match="lapefast_edit"):
        llm.generate([{"prompt_token_ids": [5, 6]}], params, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
