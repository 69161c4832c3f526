"""Activations on blocks of float32, rounded to the model's dtype where eager PyTorch rounds.

The arithmetic is that of PyTorch's CUDA kernels: accurate exp, tanh and erf, IEEE division, no
multiply-add contracted behind our back. Where nvcc contracts PyTorch's own source, `tl.fma` stands
here. Which of them are bit-equal on a device is for the exhaustive comparison on that device to
say; without it none may be called exact.

Under TRITON_INTERPRET=1 libdevice does not run, casts from float32 to bfloat16 truncate, casts the
other way lose subnormals, and bfloat16 compares as integers. So blocks are widened at the load,
computed and compared in float32, and narrowed at the store, there by integer arithmetic.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

__all__ = ["activate", "narrow", "rounded", "widen"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x):
    """A block of float32, float16 or bfloat16 as float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """A block of float32 rounded to `dtype`, to nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        # A NaN whose payload lies in the lower half would become infinity.
        bits = tl.where(x == x, nearest, 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """A block of float32 whose values `dtype` can hold."""
    return widen(narrow(x, dtype))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """`ACTIVATION(x)`, a name of `lapefast.ops.ACTIVATIONS`, as float32 values of `dtype`."""
    if ACTIVATION == "identity":
        return x
    elif ACTIVATION == "relu":
        return _relu(x)
    elif ACTIVATION == "relu_squared":
        positive = _relu(x)
        return rounded(positive * positive, dtype)
    elif ACTIVATION == "silu":
        return rounded(tl.div_rn(x, 1.0 + _exp(-x)), dtype)
    elif ACTIVATION == "gelu":
        return rounded((x * 0.5) * (1.0 + tl.erf(x * 0.70710678118654752)), dtype)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.79788456080286536 * tl.fma((x * x) * x, 0.044715, x)
        return rounded((0.5 * x) * (1.0 + _tanh(inner)), dtype)
    elif ACTIVATION == "gelu_new":
        # Composed in Python: a rounding after every operation. torch.pow(x, 3) on CUDA is
        # base * base * base in the tensor's own type, so the square is rounded too.
        cube = rounded(rounded(x * x, dtype) * x, dtype)
        inner = rounded(x + rounded(0.044715 * cube, dtype), dtype)
        inner = rounded(0.79788456080286536 * inner, dtype)
        plus_one = rounded(1.0 + rounded(_tanh(inner), dtype), dtype)
        return rounded(rounded(0.5 * x, dtype) * plus_one, dtype)
    else:
        tl.static_assert(ACTIVATION == "quick_gelu", "unknown activation")
        sigmoid = tl.div_rn(1.0, 1.0 + _exp(-rounded(1.702 * x, dtype)))
        return rounded(x * rounded(sigmoid, dtype), dtype)


@triton.jit
def _relu(x):
    # NaN stays. -0 becomes +0, as in eager on a GPU: it clamps by the maximum of x and 0, and of -0
    # and +0 PTX takes +0.
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _exp(x):
    # On a GPU, tl.exp is 2 to the power of x * log2(e), whose rounding costs large x several units.
    if INTERPRETED:
        return tl.exp(x.to(tl.float64)).to(tl.float32)
    else:
        return libdevice.exp(x)


@triton.jit
def _tanh(x):
    if INTERPRETED:
        power = tl.exp(2.0 * tl.abs(x).to(tl.float64))
        magnitude = (1.0 - 2.0 / (power + 1.0)).to(tl.float32)
        return tl.where(x < 0.0, -magnitude, magnitude)
    else:
        return libdevice.tanh(x)
