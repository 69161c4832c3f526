"""Edits as adapters in an unmodified vLLM: deactivating and scaling neurons, per request."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from adapters import adapter
from engines import asking, engine
from tiny import NAMES, hooked, place, prompts
from vllm.lora.request import LoRARequest

import lapefast as lf
from lapefast.models import find_sites


@pytest.fixture(scope="module")
def edits(llama):
    """Edits of unequal sizes: other numbers of neurons in each layer, and none in one."""
    generator = torch.Generator().manual_seed(2)

    def some(*sizes):
        sites = [site.name for site in find_sites(llama.model)]
        return {
            site: torch.randperm(192, generator=generator)[:size]
            for site, size in zip(sites, sizes, strict=True)
        }

    return {
        "off": lf.deactivate(some(60, 13, 0)).bind(llama.model),
        "triple": lf.scale(some(7, 64, 30), 3.0).bind(llama.model),
    }


def test_requests_with_different_adapters_and_none_in_one_batch(
    llama, edits, tmp_path, monkeypatch
):
    monkeypatch.delenv("LAPEFAST_EDITS")
    requests = {None: None}
    for number, (name, edit) in enumerate(edits.items(), 1):
        adapter(llama.model, edit, tmp_path / name)
        requests[name] = LoRARequest(name, number, str(tmp_path / name))
    asks = [(prompt, name) for prompt in prompts(4, 70) for name in requests]
    expected = [hooked(llama.model, prompt, edits.get(name), 12) for prompt, name in asks]
    assert len({tuple(tokens) for tokens in expected}) == len(asks)
    # One slot more than adapters: see docs/serving.md.
    options = {"enable_lora": True, "max_loras": len(edits) + 1, "max_lora_rank": 64}
    with engine(llama.path, **options) as llm:
        for _ in range(2):  # and again from the cache
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt, _ in asks],
                asking(None),
                lora_request=[requests[name] for _, name in asks],
                use_tqdm=False,
            )
            assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    # What lapefast itself makes of them.
    for (prompt, name), tokens in zip(asks[1:3], expected[1:3], strict=True):
        with lf.steer(llama.model, edits[name]):
            assert hooked(llama.model, prompt, None, 12) == tokens


def test_a_request_with_an_adapter_and_an_edit_of_the_plugin(llama, edits, tmp_path):
    """The plugin edits the activation; the adapter changes what is then made of it."""
    adapter(llama.model, edits["triple"], tmp_path / "triple")
    request = LoRARequest("triple", 1, str(tmp_path / "triple"))
    asks = [(prompt, name) for prompt in prompts(2, 70, seed=1) for name in NAMES]
    expected = []
    for prompt, name in asks:
        with ExitStack() as stack:
            place(stack, llama.model, llama.edits.get(name))
            expected.append(hooked(llama.model, prompt, edits["triple"], 12))
    with engine(llama.path, enable_lora=True, max_loras=2, max_lora_rank=64) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in asks],
            [asking(name) for _, name in asks],
            lora_request=[request] * len(asks),
            use_tqdm=False,
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
