"""Engines of other configurations: a small cache, none, an edit of the whole server, bfloat16."""

from __future__ import annotations

import torch
from engines import answers, engine
from half_precision import differences
from tiny import asked, prompts

from lapefast.neurons import save_edits


def test_requests_that_are_preempted(llama, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    original = Scheduler._preempt_request

    def spy(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", spy)
    asks = asked(2, 30, seed=6)
    # Eight sequences of up to 70 tokens need 24 blocks of 32.
    with engine(llama.path, num_gpu_blocks_override=12) as llm:
        got = answers(llm, asks, tokens=40)
    assert preempted
    assert got == [llama.expected(*ask, 40) for ask in asks]


def test_without_a_prefix_cache(llama):
    asks = asked(1, 40, seed=7)
    with engine(llama.path, enable_prefix_caching=False) as llm:
        assert answers(llm, asks) == [llama.expected(*ask) for ask in asks]


def test_an_edit_of_the_whole_server_and_requests_that_ask_for_another(
    llama, tmp_path, monkeypatch
):
    save_edits(tmp_path / "edits.json", llama.edits, server="on")
    monkeypatch.setenv("LAPEFAST_EDITS", str(tmp_path / "edits.json"))
    prompt = prompts(1, 100, seed=10)[0]
    asks = [(prompt, name) for name in (None, "none", "off", None, "none", "on")]
    means = {None: "on", "none": None}
    expected = [llama.expected(prompt, means.get(name, name)) for _, name in asks]
    with engine(llama.path) as llm:
        assert answers(llm, asks) == expected
        # One after the other: from the cache.
        assert [answers(llm, [ask])[0] for ask in asks] == expected


def test_half_precision_edits_are_exact_where_they_are_made(llama):
    """In bfloat16 the op's product is that of the eager expression, edited, bit for bit."""
    with engine(llama.path, dtype="bfloat16") as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        activation = model.model.layers[0].mlp.act_fn
        x = torch.randn(6, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
        sets = torch.tensor([-1, 0, 1, 2, 3, 4], dtype=torch.int32)
        activation._rows.begin(sets)
        got = activation.compute(x)
        activation._rows.end()
    expected = torch.nn.functional.silu(x[:, :192])
    for row, edit in enumerate(list(llama.edits.values()), 1):
        neurons, scale, shift = edit.tables["layers.0.mlp"]
        edited = scale * expected[row, neurons].float() + shift
        expected[row, neurons] = edited.bfloat16()
    assert torch.equal(got, expected * x[:, 192:])


def test_half_precision_costs_what_the_dtype_costs(llama):
    """vLLM and transformers round in different places, in bfloat16 each within what it costs.

    So they may differ by what the two cost together; an edit makes that no worse.
    """
    for name, (served, single) in differences(llama).items():
        assert served.mean() < 2 * single.mean(), name
