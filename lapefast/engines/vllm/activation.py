"""The op that stands where an FFN's activation stood."""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lapefast.engines.vllm.placement import FFN
from lapefast.engines.vllm.rows import Rows
from lapefast.models.activations import fused_dtypes

__all__ = ["PlacedActivation"]


class PlacedActivation(nn.Module, ABC):
    """Takes an activation's place: `act(gate) * up` of a fused input, or `act(x)`.

    Args:
        ffn: the FFN, as it was found.
        rows: what the model's FFNs share.
        number: which of them this is.
    """

    def __init__(self, ffn: FFN, rows: Rows, number: int) -> None:
        super().__init__()
        self.activation, self.gated, self.width = ffn.activation, ffn.gated, ffn.stop - ffn.start
        self._kernel, self._fused = fused_dtypes(ffn.activation, rows.index.device, "auto", True)
        self._rows = rows
        self._calls, self._seen = rows.fired[number]
        self.flags = rows.flags[number]
        # A tensor and not a number: layers that differ in nothing else are compiled once.
        key = next(_keys)
        self.register_buffer("key", torch.tensor(key, device="cpu"), persistent=False)
        _placed[key] = self

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.lapefast_vllm.placed_activation(x, self.gated, self.key)

    def compute(self, x: Tensor) -> Tensor:
        """What the op does: [..., 2 * width or width] to [..., width]."""
        if x.shape[-1] != self.width * (2 if self.gated else 1):
            raise RuntimeError(
                f"an FFN of {self.width} neurons was given an input of width {x.shape[-1]}"
            )
        gate, up = (x[..., : self.width], x[..., self.width :]) if self.gated else (x, None)
        number = x.numel() // x.shape[-1]
        self._calls.add_(1)
        self._seen.add_(number)
        kernel = self._kernel
        if x.dtype not in self._fused:
            gate, kernel = self.activation(gate), "identity"
        return self.product(gate, up, kernel, self._rows.index[:number])

    @abstractmethod
    def product(self, gate: Tensor, up: Tensor | None, kernel: str, index: Tensor) -> Tensor:
        """The product [..., width], and whatever else is done here.

        Args:
            gate: [..., width], or the activation itself where `kernel` is "identity".
            up: like `gate`; None where the model's own code multiplies, or nothing does.
            kernel: the activation that is still to be computed.
            index: of each row, int32 [rows].
        """


# The op finds its module here, in the way that vLLM's attention finds its layer.
_placed: weakref.WeakValueDictionary[int, PlacedActivation] = weakref.WeakValueDictionary()
_keys = itertools.count()

# A namespace of its own: it computes nothing that `lapefast.ops` does not.
_LIBRARY = torch.library.Library("lapefast_vllm", "DEF")
_LIBRARY.define("placed_activation(Tensor x, bool gated, Tensor key) -> Tensor")


def _compute(x: Tensor, gated: bool, key: Tensor) -> Tensor:
    return _placed[int(key)].compute(x)


@torch.library.register_fake("lapefast_vllm::placed_activation", lib=_LIBRARY)
def _(x, gated, key):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1])


_LIBRARY.impl("placed_activation", _compute, "CompositeExplicitAutograd")
