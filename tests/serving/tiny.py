"""Tiny random models, edits of them, and what Hugging Face makes of both with plain hooks.

Weights are scaled so that tokens follow from the FFNs: an edit changes what is generated.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn

import lapefast as lf
from lapefast.models import find_sites
from lapefast.models.structure import find_ffns
from lapefast.neurons import Edit, save_edits

VOCABULARY = 256
NEW_TOKENS = 12
NAMES = [None, "off", "on", "more", "triple", "off-and-on"]


@dataclass
class Tiny:
    """A model on disk and in memory, and edits of it.

    Attributes:
        path: where `save_pretrained` wrote it.
        model: the same, in float32.
        edits: name -> edit, bound to it.
        edit_file: the edits as they are served.
    """

    path: Path
    model: nn.Module
    edits: dict[str, Edit]
    edit_file: Path
    known: dict = field(default_factory=dict)

    def expected(self, prompt: list[int], name: str | None, tokens: int = NEW_TOKENS) -> list[int]:
        """What the model goes on with by itself under an edit: greedy, all positions edited."""
        key = (tuple(prompt), name, tokens)
        if key not in self.known:
            self.known[key] = hooked(self.model, prompt, self.edits.get(name), tokens)
        return self.known[key]


def hooked(model: nn.Module, prompt: list[int], edit: Edit | None, tokens: int) -> list[int]:
    """The greedy continuation, with the edit done by a hook on each activation module."""
    with ExitStack() as stack:
        place(stack, model, edit)
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


def place(stack: ExitStack, model: nn.Module, edit: Edit | None) -> None:
    """Hook the edit's activations until the stack closes."""
    for ffn in find_ffns(model) if edit is not None else ():
        if ffn.site.name in edit.tables:
            hook = _hook(*edit.tables[ffn.site.name])
            stack.callback(ffn.activation.register_forward_hook(hook).remove)


def _hook(neurons, scale, shift):
    def hook(module, args, output):
        edited = output.clone()
        edited[..., neurons] = (scale * output[..., neurons].float() + shift).to(output.dtype)
        return edited

    return hook


def prompts(number: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, [number, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (number, length), generator=generator).tolist()


def asked(number: int, length: int, seed: int = 0):
    """Every prompt under every edit."""
    return [(prompt, name) for prompt in prompts(number, length, seed) for name in NAMES]


def llama(path: Path, **changes) -> Tiny:
    """A Llama of three layers with 192 neurons each."""
    return make(path, transformers.LlamaConfig(**{**_LLAMA, **changes}))


def make(path: Path, config) -> Tiny:
    """The random model of a configuration, saved, with edits that each touch a third of it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(path / "model")
    # The name that a loaded model has.
    model.config._name_or_path = str(path / "model")
    edits = {name: edit.bind(model) for name, edit in edits_of(model).items()}
    save_edits(path / "edits.json", edits)
    return Tiny(path / "model", model, edits, path / "edits.json")


def edits_of(model: nn.Module) -> dict[str, Edit]:
    """One edit of each kind, on neurons of its own, and two joined."""
    generator = torch.Generator().manual_seed(1)

    def some():
        return {
            site.name: torch.randperm(site.width, generator=generator)[: site.width // 3]
            for site in find_sites(model)
        }

    values = {site.name: torch.rand(site.width, generator=generator) for site in find_sites(model)}
    off, on = lf.deactivate(some()), lf.activate(some(), values)
    return {
        "off": off,
        "on": on,
        "more": lf.add(some(), values, strength=2.0),
        "triple": lf.scale(some(), 3.0),
        "off-and-on": off | on,
    }


# Heads of 32: the smallest that vLLM's attention takes on a CPU.
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
