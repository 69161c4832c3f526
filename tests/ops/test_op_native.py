"""The native library believes nothing that it is told about tensors."""

from __future__ import annotations

import pytest
import torch
from op_cases import Tally, values

from lapefast import _native
from lapefast.errors import InputError

SILU = 1


def arguments(**changes):
    gate = values(4, 24, dtype=torch.bfloat16)
    tally = Tally(2, 24)
    given = {
        "gate": gate,
        "up": values(4, 24, dtype=torch.bfloat16, seed=1),
        "product": torch.empty_like(gate),
        "activation": SILU,
        "threshold": 0.0,
        "groups": torch.tensor([0, 1, -1, 0], dtype=torch.int32),
        "counts": tally.counts,
        "sums": tally.sums,
        "square_sums": tally.square_sums,
        "up_abs_sums": tally.up_abs_sums,
        "flags": tally.flags,
        "resource": 1,
    }
    return given | changes


BAD = {
    "another activation": ({"activation": 8}, "activation has no such number"),
    "whole numbers": ({"gate": torch.zeros(4, 24, dtype=torch.int32)}, "gate must be float32"),
    "a scalar": ({"gate": torch.tensor(1.0)}, "gate must have a last dimension"),
    "a short product": ({"product": torch.empty(3, 24, dtype=torch.bfloat16)}, "product must be"),
    "a wider up": ({"up": torch.zeros(4, 25, dtype=torch.bfloat16)}, "up must be as gate is"),
    "a longer up": ({"up": torch.zeros(4, 24)}, "up must be as gate is"),
    "spaced columns": (
        {"up": torch.zeros(4, 48, dtype=torch.bfloat16)[:, ::2]},
        "up must have a last stride of 1",
    ),
    "rows of two strides": (
        {
            "gate": torch.zeros(2, 3, 24, dtype=torch.bfloat16)[:, :2],
            "up": None,
            "up_abs_sums": None,
        },
        "gate must have rows one fixed stride apart",
    ),
    "few groups": ({"groups": torch.zeros(3, dtype=torch.int32)}, "groups is of another size"),
    "long groups": ({"groups": torch.zeros(4, dtype=torch.int64)}, "groups is of another type"),
    "narrow counts": ({"counts": torch.zeros(2, 23, dtype=torch.int64)}, "counts is of another"),
    "more sums": ({"sums": torch.zeros(3, 24, dtype=torch.float64)}, "sums is of another size"),
    "turned sums": (
        {"sums": torch.zeros(24, 2, dtype=torch.float64).t()},
        "sums must be contiguous",
    ),
    "an up of other rows": ({"up": torch.zeros(2, 2, 24, dtype=torch.bfloat16)}, "as gate is"),
    "counts of three dimensions": (
        {"counts": torch.zeros(1, 2, 24, dtype=torch.int64)},
        "counts is of another size",
    ),
    "flags of two dimensions": ({"flags": torch.zeros(1, 2, dtype=torch.int64)}, "one dimension"),
    "no threshold": ({"threshold": float("nan")}, "threshold must be a number"),
    "one flag": ({"flags": torch.zeros(1, dtype=torch.int64)}, "flags is of another size"),
    "no up": ({"up": None}, "up_abs_sums needs up"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        _native.profile(*arguments(**changes).values())


class Described:
    """A tensor as versions of torch show it whose class has no table of functions."""

    def __init__(self, tensor):
        self._tensor = tensor
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.stride, self.data_ptr = tensor.stride, tensor.data_ptr
        self.element_size = tensor.element_size


def test_tensors_of_older_versions_of_torch_are_read_from_python():
    read, asked = arguments(), arguments()
    _native.profile(*read.values())
    described = {
        name: Described(value) if torch.is_tensor(value) else value for name, value in asked.items()
    }
    _native.profile(*described.values())
    for name in ("product", "counts", "sums", "square_sums", "up_abs_sums", "flags"):
        assert torch.equal(read[name], asked[name])
    with pytest.raises(InputError, match="gate must be float32"):
        _native.profile(*(described | {"gate": Described(torch.zeros(4, 24).double())}).values())


def test_a_table_that_an_edit_reads_must_fit():
    gate, flags = values(4, 24, dtype=torch.float32), torch.zeros(2, dtype=torch.int64)
    offsets, neurons = torch.tensor([0, 1]).int(), torch.tensor([3]).int()
    scale, shift = torch.zeros(1), torch.zeros(2)
    with pytest.raises(InputError, match="shift is of another size"):
        _native.edit(
            gate, None, torch.empty_like(gate), SILU, None, offsets, neurons, scale, shift, flags, 1
        )
