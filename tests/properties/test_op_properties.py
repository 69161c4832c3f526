"""On any input, the native library computes what the reference does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapefast import ops
from lapefast.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What must agree bit for bit: docs/numerics.md.
EXACT = [("identity", dtype) for dtype in DTYPES] + sorted(
    ((name, dtype) for name, dtype, _ in ops.FUSED), key=str
)
# Sums are float32 over at most 64 rows, of squares that were rounded once.
SUM_ERROR = 65 * 2**-24
SPECIAL = (math.inf, -math.inf, math.nan, -0.0)


@st.composite
def gates(draw):
    """Activation, and gate and up (or None) as models lay them out in memory."""
    activation, dtype = draw(st.sampled_from(EXACT))
    rows = draw(st.sampled_from([0, 1, 2, 3, 5, 64, 65, 131, 260]) | st.integers(0, 400))
    width = draw(st.sampled_from([0, 1, 7, 8, 33, 64, 65, 127]) | st.integers(0, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def values(*shape):
        made = (torch.randn(*shape, generator=generator) * 3).to(dtype)
        for special in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
            if made.numel():
                made.view(-1)[draw(st.integers(0, made.numel() - 1))] = special
        return made

    layout = draw(st.sampled_from(["plain", "fused", "unaligned", "repeated", "turned", "two"]))
    if layout == "fused":
        gate, up = values(rows, 2 * width).chunk(2, dim=-1) if width else (values(rows, 0),) * 2
    elif layout == "unaligned":
        gate, up = values(rows, width + 1)[:, 1:], values(rows, width + 3)[:, 2:-1]
    elif layout == "repeated":
        gate, up = values(1, width).expand(rows, width), values(rows, width)
    elif layout == "turned":
        gate, up = values(width, rows).t(), values(rows, 2 * width)[:, ::2]
    else:
        gate, up = values(rows, width), values(rows, width)
    if layout == "two" and rows % 2 == 0:
        gate, up = gate.reshape(2, rows // 2, width), up.reshape(2, rows // 2, width)
    return activation, gate, up if draw(st.booleans()) else None


@st.composite
def indices(draw, rows, number):
    """None, one for all rows, or one for each: -1 or below `number`."""
    kind = draw(st.sampled_from(["none", "one", "each", "runs"]))
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = 1 if kind == "one" else rows
    each = torch.randint(-1, number, (size,), generator=generator, dtype=torch.int32)
    return each.sort().values if kind == "runs" else each


def statistics_for(wanted, groups, width):
    made = {
        name: torch.zeros(groups, width, dtype=torch.int64 if name == "counts" else torch.float64)
        if name in wanted
        else None
        for name in ("counts", "sums", "square_sums", "up_abs_sums")
    }
    return {**made, "flags": torch.zeros(2, dtype=torch.int64)}


def rows_of(gate):
    return math.prod(gate.shape[:-1])


def same_bits(found, expected):
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(0.0, math.inf, -math.inf), expected.nan_to_num(0.0, math.inf, -math.inf)
    )


def same_statistics(found, expected, sizes):
    """Counts and flags are equal; sums as near as `sizes`, sums of absolute values, allow."""
    for name, tensor in found.items():
        if tensor is None:
            continue
        if name in ("counts", "flags"):
            assert torch.equal(tensor, expected[name]), name
            continue
        finite = expected[name].isfinite()
        assert torch.equal(tensor.isfinite(), finite), name
        assert bool(((tensor - expected[name]).abs() <= SUM_ERROR * sizes[name])[finite].all())


def sizes_of(product, gate, up, activation, groups, number):
    """What the sums would be of absolute values, float64."""
    activated = torch.empty_like(gate, memory_format=torch.contiguous_format)
    sizes = statistics_for(("sums", "square_sums", "up_abs_sums"), number, gate.shape[-1])
    flags = torch.zeros(2, dtype=torch.int64)
    activated = ops.profile(
        gate, None, activation, 0.0, None, None, None, None, None, flags, backend="reference"
    )
    for name, values in (("sums", activated), ("square_sums", product), ("up_abs_sums", up)):
        if values is not None:
            power = values.double().abs() ** (2 if name == "square_sums" else 1)
            ops.profile(
                power.float(), None, "identity", 0.0, groups,
                None, sizes[name], None, None, flags, backend="reference",
            )  # fmt: skip
    return sizes


@given(st.data(), gates(), st.integers(1, 4), st.sampled_from([0.0, 0.1, -0.5, math.inf]))
def test_profile_and_observe_equal_the_reference(data, given_gates, number, threshold):
    activation, gate, up = given_gates
    groups = data.draw(indices(rows_of(gate), number))
    names = ["counts", "sums", "square_sums"] + ["up_abs_sums"] * (up is not None)
    wanted = data.draw(st.sets(st.sampled_from(names)))
    made = {}
    for backend in ("cpu", "reference"):
        kept = statistics_for(wanted, number, gate.shape[-1])
        product = ops.profile(
            gate, up, activation, threshold, groups, *kept.values(), backend=backend
        )
        made[backend] = product, kept
    assert same_bits(made["cpu"][0], made["reference"][0])
    sizes = sizes_of(made["reference"][0], gate, up, activation, groups, number)
    same_statistics(made["cpu"][1], made["reference"][1], sizes)

    seen = statistics_for(wanted - {"up_abs_sums"}, number, gate.shape[-1])
    ops.observe(
        gate, activation, threshold, groups,
        seen["counts"], seen["sums"], seen["square_sums"], seen["flags"], backend="cpu",
    )  # fmt: skip
    for name in ("counts", "sums", "flags"):  # what does not ask for the product
        if seen[name] is not None:
            assert torch.equal(seen[name].nan_to_num(), made["cpu"][1][name].nan_to_num()), name


@given(st.data(), gates(), st.integers(1, 3))
def test_profile_over_the_gate_gives_the_same_or_refuses(data, given_gates, number):
    activation, gate, up = given_gates
    groups = data.draw(indices(rows_of(gate), number))
    apart, over = (statistics_for(["counts", "sums"], number, gate.shape[-1]) for _ in range(2))
    before = gate.clone()
    product = ops.profile(gate, up, activation, 0.0, groups, *apart.values(), backend="cpu")
    try:
        ops.profile_(gate, up, activation, 0.0, groups, *over.values(), backend="cpu")
    except InputError:
        assert not gate.is_contiguous()
        assert same_bits(gate, before)
        assert not over["counts"].any()
    else:
        assert same_bits(gate, product)
        assert torch.equal(over["counts"], apart["counts"])
        assert same_bits(over["sums"], apart["sums"])


@st.composite
def tables(draw, width):
    """An edit table: offsets, neurons, scale, shift; some entries belong to no set."""
    sets = draw(
        st.lists(st.sets(st.integers(0, width - 1)) if width else st.just(set()), max_size=4)
    )
    neurons = [neuron for members in sets for neuron in sorted(members)]
    spare = [draw(st.integers(-5, 2**31 - 1)) for _ in range(draw(st.integers(0, 2)))]
    numbers = st.sampled_from([0.0, 1.0, -1.5, 0.3, 1e30, -0.0])
    count = len(neurons) + len(spare)
    values = [
        torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count)), dtype=torch.float32)
        for _ in range(2)
    ]
    offsets = torch.tensor([0] + [len(members) for members in sets]).cumsum(0)
    return offsets.int(), torch.tensor(neurons + spare, dtype=torch.int32), *values


@given(st.data(), gates())
def test_edit_equals_the_reference(data, given_gates):
    activation, gate, up = given_gates
    table = data.draw(tables(gate.shape[-1]))
    number = len(table[0]) - 1
    sets = data.draw(indices(rows_of(gate), number))
    made = []
    for backend in ("cpu", "reference"):
        flags = torch.zeros(2, dtype=torch.int64)
        try:
            made.append(ops.edit(gate, up, activation, sets, *table, flags, backend=backend))
        except InputError as error:
            made.append(str(error))
    if isinstance(made[0], str):
        assert number == 0
        assert made[0] == made[1]
    else:
        assert same_bits(*made)


@given(st.data(), gates(), st.integers(1, 3), st.sampled_from(["cpu", "reference"]))
def test_a_group_out_of_range_is_refused_before_anything_is_written(data, found, number, backend):
    activation, gate, up = found
    groups = torch.zeros(rows_of(gate), dtype=torch.int32)
    if not len(groups):
        return
    at = data.draw(st.integers(0, len(groups) - 1))
    groups[at] = data.draw(st.sampled_from([-2, number, 2**31 - 1, -(2**31)]))
    kept = statistics_for(["counts", "sums"], number, gate.shape[-1])
    with pytest.raises(InputError, match="groups holds"):
        ops.profile(gate, up, activation, 0.0, groups, *kept.values(), backend=backend)
    assert not any(bool(tensor.any()) for tensor in kept.values() if tensor is not None)


@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(0, 40), st.integers(0, 70),
    st.integers(1, 5), st.sampled_from([0.0, 30.0]), st.integers(0, 2**32), st.booleans(),
)  # fmt: skip
def test_leave_one_out_equals_the_reference(
    key_heads, served, length, columns, dimensions, softcap, seed, masked
):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(key_heads * served, length, dimensions, generator=generator)
    key = torch.randn(key_heads, columns, dimensions, generator=generator)
    logits = torch.randn(key_heads * served, length, columns, generator=generator)
    if masked:
        logits.masked_fill_(torch.rand(logits.shape, generator=generator) < 0.6, -math.inf)
    found, expected = (
        ops.leave_one_out(query, key, logits, dimensions**-0.5, softcap, backend=backend)
        for backend in ("cpu", "reference")
    )
    # Each probability is off by a few spacings, in each map, so a change's norm by that much of the
    # map's, which is at most the root of its rows.
    bound = 16 * torch.finfo(torch.float32).eps * length**0.5
    torch.testing.assert_close(found.sqrt(), expected.sqrt(), rtol=2e-6, atol=bound)
