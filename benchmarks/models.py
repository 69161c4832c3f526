"""The models whose passes are measured: Llamas of real shapes with random weights."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from baselines import Contender
from torch import Tensor, nn

import lapefast as lf


@dataclass(frozen=True)
class Shape:
    """A Llama, and the batch of token ids that a pass takes."""

    name: str
    rows: int
    length: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int


SHAPES = {
    "cpu": Shape("168M Llama", 4, 512, 1024, 2816, 8, 16, 16, 32000),
    "cuda": Shape("8B Llama", 4, 2048, 4096, 14336, 32, 32, 8, 128256),
}
TINY = Shape("tiny Llama", 2, 16, 64, 176, 2, 4, 2, 8192)


@dataclass(frozen=True)
class Llama:
    shape: Shape
    model: nn.Module
    ids: list[Tensor]  # several batches, [rows, length] each

    @property
    def what(self) -> str:
        return f"whole pass, {self.shape.name}, bf16, {self.shape.rows} x {self.shape.length}"

    @property
    def tokens(self) -> int:
        return self.shape.rows * self.shape.length

    def copy(self) -> nn.Module:
        """The model with modules of its own, to place things in, over the same weights."""
        held = (*self.model.parameters(), *self.model.buffers())
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in held})

    def operations(self, whole: bool) -> float:
        """Floating-point operations of the matrix products and the attention of one pass.

        Args:
            whole: the head, and the last FFN beyond its gate, which profiling does not need, too.
        """
        layers = self.model.model.layers
        linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
        last = layers[-1].mlp
        weights = sum(linear.weight.numel() for linear in linears)
        if whole:
            weights += self.model.lm_head.weight.numel()
        else:
            weights -= last.up_proj.weight.numel() + last.down_proj.weight.numel()
        # Two products of [length, length] by [length, hidden]; causal attention needs half of each.
        attention = 2 * self.shape.layers * self.tokens * self.shape.length * self.shape.hidden
        return 2 * self.tokens * weights + attention


def multiplies_bfloat16(device: str) -> bool:
    """Whether PyTorch has fast matrix products for it; else they take hundreds of times as long."""
    return device == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def build(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> Llama:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = [torch.randint(shape.vocabulary, (shape.rows, shape.length)) for _ in range(4)]
    return Llama(shape, model, ids)


@contextmanager
def profiling(model: nn.Module, *statistics: str):
    """lapefast's own contender: the pass that `lapefast.profile` makes."""
    with lf.record(model, ["en"], statistics=statistics) as recorder:
        recorder.end_at_last_site()
        recorder.set(label="en")
        yield Contender(
            lambda ids: model.model(input_ids=ids, use_cache=False),
            lambda: [counts[0] for counts in recorder.profile().counts.values()],
        )


def assert_equal_counts(counted: list[Tensor], expected: list[Tensor], who: str) -> None:
    for layer, (counts, over_zero) in enumerate(zip(counted, expected, strict=True)):
        assert torch.equal(counts.cpu(), over_zero.cpu()), (
            f"{who} counts otherwise in layer {layer}"
        )
