"""Every half-precision value through the GPU's kernels, on a CPU, against float32, bit for bit.

This proves the order of operations, where they round, and the treatment of NaN, infinity, zeros and
subnormals, of CUDA C++ compiled for the CPU and of Triton in its interpreter. It cannot prove a
GPU's own exp, tanh and erf, for which the C library's or NumPy's stand here, nor what a compiler
makes of it all: only the comparison on a GPU (`tests/models/test_on_device.py`) can.
"""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import named

from lapefast import ops

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def of_a_gpu(backend):
    if backend not in ("cuda", "triton"):
        pytest.skip("test_op_exact.py asks more of the CPU's kernels: --backend names a GPU's")


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, the sign of zero included; every NaN is as good as another."""
    equal = got.view(torch.int16) == expected.view(torch.int16)
    return bool((equal | (got.isnan() & expected.isnan())).all())


def one_plus_exp(x: torch.Tensor) -> torch.Tensor:
    return 1 + x.double().exp().float()


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x <= 0, 0.0, x)  # of -0 too: on a GPU the maximum of -0 and +0 is +0


def gelu_new(x: torch.Tensor, r) -> torch.Tensor:
    cube = r(r(x * x) * x)
    inner = r(math.sqrt(2 / math.pi) * r(x + r(0.044715 * cube)))
    return r(0.5 * x) * r(1 + r(inner.double().tanh().float()))


# What eager computes on a GPU, where the cube of gelu_new is two products in the dtype: in float32,
# with `r` rounding to the dtype; the last rounding is the caller's.
EXPECTED = {
    "identity": lambda x, r: x,
    "silu": lambda x, r: x / one_plus_exp(-x),
    "relu": lambda x, r: relu(x),
    "relu_squared": lambda x, r: relu(x) * relu(x),
    "gelu_new": gelu_new,
    "quick_gelu": lambda x, r: x * r(1 / one_plus_exp(-r(1.702 * x))),
}


@pytest.mark.parametrize("dtype", HALVES, ids=named)
@pytest.mark.parametrize("activation", EXPECTED)
def test_every_half_is_computed_in_float32_and_rounded_where_eager_rounds(
    activation, dtype, backend, device
):
    if device.type != "cpu":
        pytest.skip("a GPU has an exp and tanh of its own: test_on_device.py has eager beside it")
    gate, flags = every_value(dtype), torch.zeros(2, dtype=torch.int64)
    counts = torch.zeros(1, 1024, dtype=torch.int64)
    got = ops.profile(
        gate, None, activation, 0.0, None, counts, None, None, None, flags, backend=backend
    )
    expected = EXPECTED[activation](gate.float(), lambda x: x.to(dtype).float()).to(dtype)
    assert same_bits(got, expected)
    assert torch.equal(counts[0], (expected > 0).sum(0))
    assert flags.tolist() == [(~expected.isfinite()).sum(), 0]


@pytest.mark.parametrize("dtype", HALVES, ids=named)
def test_every_half_is_multiplied_and_rounded_once(dtype, backend):
    gate, flags = every_value(dtype), torch.zeros(2, dtype=torch.int64)
    up = gate.flatten().roll(12345).reshape(gate.shape)
    got = ops.profile(
        gate, up, "identity", 0.0, None, None, None, None, None, flags, backend=backend
    )
    assert same_bits(got, gate * up)


@pytest.mark.parametrize("dtype", HALVES, ids=named)
def test_every_tie_of_an_edit_is_rounded_to_even(dtype, backend):
    # The shift alone, in float32: above every value of the dtype the tie, and what is just above.
    below = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(dtype).float()
    low = 0x10000 if dtype is torch.bfloat16 else 0x2000
    around = torch.tensor([1, low // 2, low // 2 + 1], dtype=torch.int32)
    shift = (below.view(torch.int32).unsqueeze(1) + around).view(torch.float32).flatten()
    shift = torch.cat([shift, -shift])
    width = shift.numel()
    got = ops.edit(
        torch.zeros(1, width, dtype=dtype), None, "identity", None,
        torch.tensor([0, width], dtype=torch.int32), torch.arange(width, dtype=torch.int32),
        torch.zeros(width), shift, torch.zeros(2, dtype=torch.int64), backend=backend,
    )  # fmt: skip
    assert same_bits(got[0], shift.to(dtype))
