"""`edit` of a backend: against the reference, and against what an edit is defined to be."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, LAYOUTS, Edits, edits_for, named, rows_apart, run_edit, values

from lapefast import ops
from lapefast.errors import InputError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "no width"])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("gated", [True, False])
def test_edited_products_are_those_of_the_reference(layout, dtype, gated, backend, interpreted):
    if interpreted and layout == "pages":
        pytest.skip("slow, and a path of the CPU kernel's own, which --backend cpu runs")
    gate, up = LAYOUTS[layout](dtype)
    rows = gate.shape[:-1].numel()
    tables = edits_for(gate.shape[-1]).tables()
    activation = "relu" if dtype is torch.float32 else "silu"
    for sets in (
        (torch.arange(rows) % 5 - 1).to(torch.int32),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([-1], dtype=torch.int32),
        None,
    ):
        arguments = gate, up if gated else None, activation, sets, tables
        got = run_edit(*arguments, backend=backend)
        assert got.is_contiguous()
        assert torch.equal(got, run_edit(*arguments, backend="reference"))


def test_rows_beyond_two_to_the_31_elements_are_edited(backend):
    gate = rows_apart(4, 64, 2**30)
    tables = edits_for(64).tables()
    arguments = gate, gate, "silu", torch.tensor([2], dtype=torch.int32), tables
    expected = run_edit(*arguments, backend="reference")
    assert torch.equal(run_edit(*arguments, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_an_edit_multiplies_adds_and_rounds_once_from_the_rounded_activation(each_backend, dtype):
    gate, up = values(5, 70, dtype=dtype), values(5, 70, dtype=dtype, seed=1)
    tables = Edits([[(neuron, 1.1, 0.3) for neuron in range(70)]]).tables()
    got = run_edit(gate, up, "relu", None, tables, backend=each_backend)
    activation = torch.relu(gate).float()
    expected = (activation * torch.tensor(1.1) + torch.tensor(0.3)).to(dtype) * up
    assert torch.equal(got, expected)


def test_a_scale_of_zero_overwrites(each_backend):
    gate = torch.tensor([[NAN, INF, -INF, 1.0]], dtype=torch.bfloat16)
    tables = Edits([[(0, 0.0, 2.0), (1, 0.0, 0.0), (2, -0.0, -1.0)]]).tables()
    got = run_edit(gate, None, "identity", None, tables, backend=each_backend)
    assert got.tolist() == [[2.0, 0.0, -1.0, 1.0]]


def test_a_shift_that_is_nan_or_out_of_range_gives_nan_or_infinity(each_backend):
    gate = torch.ones(1, 4, dtype=torch.bfloat16)
    payload = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()
    tables = Edits([[(0, 0.0, payload), (1, 0.0, 3.4e38), (2, 1.0, -INF)]]).tables()
    got = run_edit(gate, None, "identity", None, tables, backend=each_backend)
    assert got[0, 0].isnan()
    assert got[0, 1:].tolist() == [INF, -INF, 1.0]


def test_an_edit_changes_in_place(backend):
    gate = torch.ones(1, 4, dtype=torch.bfloat16)
    offsets, neurons, scale, shift = Edits([[(1, 0.0, 2.0)]]).tables()
    tables = offsets, neurons, scale, shift
    assert run_edit(gate, None, "identity", None, tables, backend=backend)[0, 1] == 2
    shift[0] = 5.0
    neurons[0] = 3
    got = run_edit(gate, None, "identity", None, tables, backend=backend)
    assert got.tolist() == [[1.0, 1.0, 1.0, 5.0]]


def test_flags_are_left_alone(backend):
    flags = torch.tensor([3, 4])
    gate = torch.tensor([[NAN]])
    tables = Edits([[(0, 0.0, 0.0)]]).tables()
    ops.edit(gate, None, "identity", None, *tables, flags, backend=backend)
    assert flags.tolist() == [3, 4]


BAD_TABLES = {
    "a set out of range": ({"sets": [0, 4]}, "sets holds 4, but there are 2 sets"),
    "a negative set": ({"sets": [0, -2]}, "sets holds -2"),
    "a neuron out of range": ({"neurons": [1, 8]}, r"neurons of set 0 must lie within \[0, 8\)"),
    "a negative neuron": ({"neurons": [-1, 5]}, "neurons of set 0 must lie within"),
    "a repeated neuron": ({"neurons": [3, 3]}, "neurons of set 0 must ascend"),
    "neurons out of order": ({"neurons": [4, 2]}, "neurons of set 0 must ascend"),
    "offsets past the capacity": ({"offsets": [0, 3, 3]}, r"offsets\[0:2\] must ascend within"),
    "descending offsets": ({"offsets": [2, 0, 2]}, r"offsets\[0:2\] must ascend within"),
    "a negative offset": ({"offsets": [-1, 0, 2]}, r"offsets\[0:2\] must ascend within"),
    "offsets of two dimensions": ({"offsets": [[0, 2]]}, "offsets must be"),
    "too few scales": ({"scale": [1.0]}, r"scale must be contiguous torch.float32 \[2\]"),
    "too many sets": ({"sets": [0, 0, 0]}, "sets must be contiguous int32 with 2 elements"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused_in_one_sentence(case, refusing_backend):
    changes, message = BAD_TABLES[case]
    tables = {"sets": [0, 1], "offsets": [0, 2, 2], "neurons": [1, 5]}
    tables |= {"scale": [0.0, 1.0], "shift": [0.0, 1.0]} | changes
    tensors = [
        torch.tensor(
            tables[name], dtype=torch.float32 if name in ("scale", "shift") else torch.int32
        )
        for name in ("sets", "offsets", "neurons", "scale", "shift")
    ]
    flags = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match=message):
        ops.edit(torch.zeros(2, 8), None, "silu", *tensors, flags, backend=refusing_backend)


def test_sets_out_of_range_edit_nothing_and_show_in_flags(skipping_backend):
    gate = values(6, 70, dtype=torch.bfloat16)
    tables = Edits([[(3, 0.0, 2.0)], [(69, 0.0, 5.0)]]).tables()
    flags = torch.zeros(2, dtype=torch.int64)
    sets = torch.tensor([0, 2, -2, 1, 2**31 - 1, -1], dtype=torch.int32)
    got = run_edit(gate, None, "relu", sets, tables, flags=flags, backend=skipping_backend)
    expected = torch.relu(gate)
    expected[0, 3], expected[3, 69] = 2.0, 5.0
    assert torch.equal(got, expected)
    assert flags.tolist() == [0, 3]


def test_used_neurons_out_of_range_edit_nothing_and_show_in_flags(skipping_backend):
    gate = values(3, 70, dtype=torch.float32)
    members = [(-5, 0.0, 1.0), (-1, 0.0, 1.0), (4, 0.0, 9.0), (70, 0.0, 1.0), (2**30, 0.0, 1.0)]
    tables = Edits([members, [(69, 0.0, 3.0), (71, 0.0, 1.0)]]).tables()
    flags = torch.zeros(2, dtype=torch.int64)
    sets = torch.tensor([0, 1, 0], dtype=torch.int32)
    got = run_edit(gate, None, "relu", sets, tables, flags=flags, backend=skipping_backend)
    expected = torch.relu(gate)
    expected[0, 4] = expected[2, 4] = 9.0
    expected[1, 69] = 3.0
    assert torch.equal(got, expected)
    assert flags.tolist() == [0, 5]  # what is spare is not used


def test_unedited_columns_beside_edited_ones_keep_negative_zero(backend):
    gate = torch.full((2, 40), -0.0, dtype=torch.bfloat16)
    tables = Edits([[(3, 0.0, 2.0)]]).tables()
    got = run_edit(gate, None, "identity", None, tables, backend=backend)
    assert got.signbit().sum(-1).tolist() == [39, 39]
