"""A folded checkpoint in an unmodified vLLM: the whole server has the edit."""

from __future__ import annotations

import torch
from engines import answers, engine
from tiny import NEW_TOKENS, hooked, prompts

import lapefast as lf
from lapefast.models import find_sites


def test_a_folded_checkpoint_generates_what_the_edited_model_does(llama, tmp_path, monkeypatch):
    monkeypatch.delenv("LAPEFAST_EDITS")
    generator = torch.Generator().manual_seed(4)

    def some(size):
        sites = find_sites(llama.model)
        return {site.name: torch.randperm(192, generator=generator)[:size] for site in sites}

    edit = (lf.deactivate(some(50)) | lf.scale(some(30), 3.0)).bind(llama.model)
    lf.export.checkpoint(llama.model, edit, tmp_path / "folded")
    asks = [(prompt, None) for prompt in prompts(4, 70, seed=5)]
    expected = [hooked(llama.model, prompt, edit, NEW_TOKENS) for prompt, _ in asks]
    unedited = [hooked(llama.model, prompt, None, NEW_TOKENS) for prompt, _ in asks]
    assert all(mine != theirs for mine, theirs in zip(expected, unedited, strict=True))
    with engine(tmp_path / "folded") as llm:
        assert answers(llm, asks) == expected
