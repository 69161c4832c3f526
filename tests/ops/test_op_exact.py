"""What a kernel may compute in place of a module is decided here, on every value there is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import activations

from lapefast import _native, ops

# Every class that the package takes for the activation of that name.
MODULES = {
    "silu": [nn.SiLU, activations.SiLUActivation],
    "relu": [nn.ReLU],
    "relu_squared": [activations.ReLUSquaredActivation],
    "gelu": [nn.GELU, activations.GELUActivation],
    "gelu_tanh": [lambda: nn.GELU(approximate="tanh"), activations.GELUTanh],
    "gelu_new": [activations.NewGELUActivation],
    "quick_gelu": [activations.QuickGELUActivation],
}
HALVES = (torch.bfloat16, torch.float16)


def every_value(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All 65,536 bit patterns: contiguous, in rows apart, and every third element."""
    contiguous = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    contiguous = contiguous.reshape(256, 256)
    rows = torch.empty(256, 300, dtype=dtype)[:, :256].copy_(contiguous)
    spaced = torch.empty(256, 256, 3, dtype=dtype)[..., 1].copy_(contiguous)
    return {"contiguous": contiguous, "rows": rows, "spaced": spaced}


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, the sign of zero included; every NaN is as good as another."""
    equal = got.contiguous().view(torch.int16) == expected.contiguous().view(torch.int16)
    return bool((equal | (got.isnan() & expected.isnan())).all())


def computed(gate: torch.Tensor, name: str) -> torch.Tensor:
    flags = torch.zeros(2, dtype=torch.int64)
    return ops.profile(gate, None, name, 0.0, None, None, None, None, None, flags, backend="cpu")


def proven() -> set[tuple[str, torch.dtype, str]]:
    found = set()
    for dtype in HALVES:
        layouts = every_value(dtype)
        for name, modules in MODULES.items():
            if all(
                same_bits(computed(gate, name), module()(gate))
                for module in modules
                for gate in layouts.values()
            ):
                found.add((name, dtype, "cpu"))
    return found


@pytest.mark.parametrize("isa", _native.available_isas())
def test_fused_is_what_is_proven_on_every_instruction_set(isa):
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"LAPEFAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [isa, *sorted(written(ops.FUSED))]


def written(entries) -> list[str]:
    return [
        f"{name}:{str(dtype).removeprefix('torch.')}:{device}" for name, dtype, device in entries
    ]


def test_every_activation_has_the_modules_it_is_compared_with():
    assert set(MODULES) == set(ops.ACTIVATIONS) - {"identity"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_native.isa(), *sorted(written(proven())))
