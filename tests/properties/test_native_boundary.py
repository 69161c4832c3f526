"""Whatever the native library is given, it computes or refuses, and touches nothing else.

`make test-sanitizers` runs this on a library built with the address and undefined-behaviour
sanitizers, so that an access one byte outside a tensor ends the run.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from lapefast.errors import InputError
from lapefast.ops.backends import native

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64,
    torch.int16, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
SIZES = st.sampled_from([0, 1, 2, 3, 4, 24, 33])
HUGE = st.sampled_from([0, 1, 2**31, 2**40, 2**62])
NO_TENSORS = [None, 1, "gate", [[1.0]], np.zeros((4, 24), np.float32), object(), torch.Tensor]


@st.composite
def tensors(draw):
    """A tensor of any type, shape and strides, with anything in it; or something else."""
    kind = draw(st.sampled_from(["dense", "view", "shifted", "repeated", "huge", "odd", "other"]))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(SIZES, max_size=4))
    if kind == "other":
        return draw(st.sampled_from(NO_TENSORS))
    if kind == "huge":
        # Of no bytes, or one element over and over.
        sizes = draw(st.lists(HUGE, min_size=1, max_size=4))
        try:
            empty = 0 in sizes
            return torch.zeros(sizes if empty else 1, dtype=dtype).expand(sizes)
        except RuntimeError:  # torch's own limits
            return None
    if kind == "odd":
        made = torch.zeros(shape, dtype=dtype)
        kinds = ["meta", "sparse", "gradient", "negative", "zeros", "fake", "view of bytes"]
        odd = draw(st.sampled_from(kinds))
        if odd == "meta":
            return made.to("meta")
        if odd == "sparse":
            return made.to_sparse() if shape else made
        if odd == "gradient":
            return made.requires_grad_(dtype.is_floating_point)
        if odd == "negative":
            return torch._neg_view(made) if dtype is not torch.bool else made
        if odd in ("zeros", "fake"):  # of no memory, and yet not from null on
            size, offset = torch.Size(shape).numel(), draw(st.sampled_from([0, 1, 8, 2**20]))
            with FakeTensorMode() if odd == "fake" else contextlib.nullcontext():
                make = torch.zeros if odd == "fake" else torch._efficientzerotensor
                return make(offset + size, dtype=dtype)[offset:].view(shape)
        count = draw(st.integers(1, 96))
        return torch.frombuffer(bytearray(1024), dtype=dtype, offset=1, count=count)
    byte = draw(st.sampled_from([0, 1, 0x3F, 0x7F, 0xFF]))
    margin = draw(st.integers(0, 3)) if kind == "shifted" else 0
    size = torch.Size(shape).numel() + margin
    made = torch.full((size * dtype.itemsize,), byte, dtype=torch.uint8).view(dtype)
    made = made[margin:].view(shape)
    if kind == "repeated" and shape:
        made = made[..., :1].expand(shape) if draw(st.booleans()) else made[:1].expand(shape)
    if kind == "view" and shape:
        at = draw(st.integers(0, len(shape) - 1))
        made = made.transpose(at, -1) if draw(st.booleans()) else made.narrow(at, 0, shape[at] // 2)
    return made


def fitting(dtype, rows=4, width=24, number=2):
    """Arguments that fit each other, by name."""
    floats = {name: torch.randn(rows, width).to(dtype) for name in ("gate", "up", "product")}
    index = torch.tensor([0, 1, -1, 0], dtype=torch.int32)
    profile = {
        **floats, "activation": 1, "threshold": 0.0, "groups": index,
        "counts": torch.zeros(number, width, dtype=torch.int64),
        **{
            name: torch.zeros(number, width, dtype=torch.float64)
            for name in ("sums", "square_sums", "up_abs_sums")
        },
        "flags": torch.zeros(2, dtype=torch.int64), "threads": 1,
    }  # fmt: skip
    edit = {
        **floats, "activation": 1, "sets": index,
        "offsets": torch.tensor([0, 2, 3], dtype=torch.int32),
        "neurons": torch.tensor([3, 5, 0], dtype=torch.int32),
        "scale": torch.ones(3), "shift": torch.ones(3),
        "flags": torch.zeros(2, dtype=torch.int64), "threads": 1,
    }  # fmt: skip
    maps = {
        "query": torch.randn(4, 3, 5), "keys": torch.randn(2, 5, 32),
        "logits": torch.randn(4, 3, 32), "probabilities": torch.rand(4, 3, 32),
        "ends": torch.full((4, 3), 32, dtype=torch.int32),
        "scores": torch.zeros(4, 5, dtype=torch.float64), "threads": 1,
    }  # fmt: skip
    tables = {name: edit[name] for name in ("offsets", "neurons", "scale", "shift")}
    kept = native.library.keep_tables(*tables.values(), width)
    named = ("gate", "up", "product", "activation", "sets", "threads")
    return {
        "profile": profile,
        "edit": edit,
        "keep_tables": {**tables, "width": width},
        "edit_kept": {"tables": kept, **{name: edit[name] for name in named}},
        "edit_kept_in_place": {"tables": kept, "made": edit["gate"], "sets": index, "threads": 1},
        "leave_one_out": maps,
        "rank_rows": {
            "ranked": torch.randn(3, 4),
            "classes": torch.arange(4, dtype=torch.int32),
            "ordered": torch.zeros(3, 4, dtype=torch.int32),
            "last": torch.zeros(3, 4, dtype=torch.int8),
        },
    }


OPS = sorted(fitting(torch.float32))
WRITTEN = (
    "product",
    "counts",
    "sums",
    "square_sums",
    "up_abs_sums",
    "flags",
    "scores",
    "made",
    "ordered",
    "last",
)
SCALARS = {
    "activation": st.integers(-2, 9),
    "threshold": st.floats(),
    "threads": st.integers(-1, 4),
    "width": st.sampled_from([-1, 0, 5, 6, 23, 25, 2**31, 2**62]),
}


# What pybind11 and torch refuse by themselves beside what the library refuses.
REFUSED = (InputError, TypeError, AttributeError, RuntimeError, BufferError)


@given(st.data(), st.sampled_from(OPS))
def test_the_library_computes_or_refuses_and_then_writes_nothing(data, op):
    arguments = fitting(data.draw(st.sampled_from(DTYPES[:3])))[op]
    before = {name: (v, v.clone()) for name, v in arguments.items() if torch.is_tensor(v)}
    for name in data.draw(st.sets(st.sampled_from(sorted(arguments)), max_size=3)):
        one_of_the_others = st.sampled_from([value for value, _ in before.values()])
        known = name in SCALARS
        arguments[name] = data.draw(SCALARS[name] if known else tensors() | one_of_the_others)
    try:
        getattr(native.library, op)(*arguments.values())
    except REFUSED:
        assert [name for name, (now, then) in before.items() if not torch.equal(now, then)] == []
    else:
        # What was only to be read may have been given as what is to be written, too.
        written = {id(arguments[name]) for name in WRITTEN if name in arguments}
        for name, (now, then) in before.items():
            assert id(now) in written or torch.equal(now, then), name
