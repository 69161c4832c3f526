"""`profile`, `profile_` and `observe` of a backend against eager PyTorch and the reference."""

from __future__ import annotations

import pytest
import torch
from op_cases import (
    DTYPES,
    LAYOUTS,
    STATISTICS,
    Tally,
    named,
    reserved_zeros,
    row_groups,
    rows_apart,
    run_profile,
    same_sums,
    values,
)

from lapefast import ops
from lapefast.errors import InputError
from lapefast.ops import declarations
from lapefast.ops.backends import cpu

# n float32 additions err by at most n 2^-24 of the sum of magnitudes. At most 64 rows are added in
# float32; a square is rounded once before.
SHARE = 65 * 2.0**-24
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu_squared", "identity"])
def test_product_and_statistics_are_those_of_the_reference(
    layout, dtype, gated, activation, backend, interpreted
):
    if interpreted and layout == "pages":
        pytest.skip("slow, and a path of the CPU kernel's own, which --backend cpu runs")
    if dtype is torch.float32 and activation == "silu":
        activation = "relu"  # eager float32 SiLU disagrees with itself
    gate, up = LAYOUTS[layout](dtype)
    if not gated:
        up = None
    rows = gate.shape[:-1].numel()
    groups = row_groups(rows, 3)
    names = STATISTICS if gated else STATISTICS[:3]
    got, expected = (Tally(3, gate.shape[-1], names) for _ in range(2))
    product = run_profile(gate, up, activation, groups, got, threshold=0.25, backend=backend)
    reference = run_profile(
        gate, up, activation, groups, expected, threshold=0.25, backend="reference"
    )
    assert product.is_contiguous()
    assert torch.equal(product, reference)
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.flags, expected.flags)
    magnitudes = Tally(3, gate.shape[-1], ("sums",))
    activated = ops.ACTIVATIONS[activation](gate)
    ops.observe(
        activated.abs(), "identity", 0.0, groups, *magnitudes.observed(), backend="reference"
    )
    assert ((got.sums - expected.sums).abs() <= SHARE * magnitudes.sums).all()
    for name in names[2:]:  # sums of what is never negative
        total = getattr(expected, name)
        assert ((getattr(got, name) - total).abs() <= SHARE * total).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_writing_over_gate_gives_the_same_and_leaves_the_rest_of_a_fused_tensor(dtype, backend):
    both = values(5, 3, 88, dtype=dtype)
    before = both.clone()
    gate, up = both.chunk(2, dim=-1)
    tally, again = Tally(1, 44), Tally(1, 44)
    product = run_profile(before[..., :44], before[..., 44:], "relu", None, tally, backend=backend)
    ops.profile_(gate, up, "relu", 0.0, None, *again.arguments(), backend=backend)
    assert torch.equal(gate, product)
    assert torch.equal(up, before[..., 44:])
    assert torch.equal(tally.counts, again.counts)
    assert same_sums(tally.sums, again.sums)


@pytest.mark.parametrize("layout", ["contiguous", "fused", "strided", "tiles"])
def test_observing_gives_the_statistics_of_profiling_without_up(layout, backend):
    gate, _ = LAYOUTS[layout](torch.bfloat16)
    got, expected = (Tally(1, gate.shape[-1], STATISTICS[:3]) for _ in range(2))
    before = gate.clone()
    ops.observe(gate, "silu", 0.0, None, *got.observed(), backend=backend)
    run_profile(gate, None, "silu", None, expected, backend=backend)
    assert torch.equal(gate, before)
    for name in ("counts", "flags"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    for name in ("sums", "square_sums"):
        assert same_sums(getattr(got, name), getattr(expected, name))


def test_a_group_of_one_element_holds_for_every_row(backend):
    gate, up = LAYOUTS["tiles"](torch.bfloat16)
    one, every = Tally(3, gate.shape[-1]), Tally(3, gate.shape[-1])
    run_profile(gate, up, "silu", torch.tensor([2], dtype=torch.int32), one, backend=backend)
    groups = torch.full((71,), 2, dtype=torch.int32)
    run_profile(gate, up, "silu", groups, every, backend=backend)
    assert torch.equal(one.counts, every.counts)
    assert same_sums(one.sums, every.sums)
    assert one.counts[:2].sum() == 0


def test_group_minus_one_counts_nowhere_but_makes_its_product(backend):
    gate, up = LAYOUTS["contiguous"](torch.bfloat16)
    tally = Tally(1, 40)
    gate[0, 0] = float("nan")
    groups = torch.full((6,), -1, dtype=torch.int32)
    product = run_profile(gate, up, "silu", groups, tally, backend=backend)
    assert torch.equal(product[1:], (torch.nn.functional.silu(gate) * up)[1:])
    assert all((value == 0).all() for value in tally.arguments())


def test_the_threshold_is_compared_in_float32(backend):
    # bfloat16(0.1) is 0.1000976..., which is above float32(0.1); rounding 0.1 first would hide it.
    gate = torch.full((1, 8), 0.1, dtype=torch.bfloat16)
    for name in (backend, "reference"):
        tally = Tally(1, 8)
        run_profile(gate, None, "identity", None, _ungated(tally), threshold=0.1, backend=name)
        assert tally.counts.sum() == 8
    assert not (gate > 0.1).any()


@pytest.mark.parametrize("threshold", [-1.0, -0.0, 1e-40, 3.0, float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_any_threshold_counts_as_the_comparison_in_float32(threshold, dtype, backend):
    gate = values(9, 70, dtype=dtype)
    tally = Tally(1, 70, ("counts",))
    run_profile(gate, None, "identity", None, tally, threshold=threshold, backend=backend)
    expected = (gate.float() > torch.tensor(threshold, dtype=torch.float32)).sum(0)
    assert torch.equal(tally.counts[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("in_place", [True, False])
def test_nonfinite_activations_are_counted_in_flags(dtype, in_place, backend):
    gate, up = values(9, 77, dtype=dtype), torch.ones(9, 77, dtype=dtype)
    for row, column, value in [(0, 0, "nan"), (3, 76, "inf"), (4, 40, "-inf"), (8, 33, "nan")]:
        gate[row, column] = float(value)
    groups = torch.tensor([0] * 8 + [-1], dtype=torch.int32)
    tally = Tally(1, 77)
    op = ops.profile_ if in_place else ops.profile
    op(gate.clone(), up, "silu", 0.0, groups, *tally.arguments(), backend=backend)
    assert tally.flags.tolist() == [3, 0]
    assert tally.counts[0, 0] == (gate[1:8, 0] > 0).sum()


def test_more_rows_than_a_counter_holds(backend, interpreted):
    # Triton's interpreter needs 8 ms for each.
    rows = 300 if interpreted else 65535 * 2 + 7
    gate = torch.ones(rows, 3, dtype=torch.bfloat16)
    tally = Tally(1, 3)
    run_profile(gate, gate, "identity", None, tally, backend=backend)
    assert tally.counts.tolist() == [[rows] * 3]
    assert tally.sums.tolist() == [[float(rows)] * 3]


# The second: a run of 16 rows for each warp, so that the next begins beyond.
@pytest.mark.parametrize(("rows", "stride"), [(4, 2**30), (17, 2**27)])
def test_rows_beyond_two_to_the_31_elements_are_addressed(rows, stride, backend):
    gate = rows_apart(rows, 64, stride)
    tally = Tally(1, 64)
    product = run_profile(gate, gate, "silu", None, tally, backend=backend)
    assert torch.equal(product, torch.nn.functional.silu(gate) * gate)
    assert torch.equal(tally.counts[0], (gate > 0).sum(0))


def test_statistics_beyond_two_to_the_31_elements_are_addressed(backend):
    width, last = 64, 2**25 + 1
    counts, flags = reserved_zeros(last + 1, width, dtype=torch.int64), torch.zeros(2).long()
    gate = values(5, width, dtype=torch.bfloat16)
    # The first is added where the group changes, the second at the end.
    groups = torch.tensor([last - 1] * 3 + [last] * 2, dtype=torch.int32)
    ops.observe(gate, "identity", 0.0, groups, counts, None, None, flags, backend=backend)
    assert torch.equal(counts[last - 1], (gate[:3] > 0).sum(0))
    assert torch.equal(counts[last], (gate[3:] > 0).sum(0))


@pytest.mark.parametrize("index", [3, -2, 2**31 - 1])
@pytest.mark.parametrize("at", [0, 5])
def test_a_group_out_of_range_is_refused_before_anything_is_written(index, at, refusing_backend):
    gate, up = LAYOUTS["contiguous"](torch.bfloat16)
    before = gate.clone()
    tally = Tally(3, 40)
    groups = torch.zeros(6, dtype=torch.int32)
    groups[at] = index
    with pytest.raises(InputError, match=f"groups holds {index}, but there are 3 groups"):
        ops.profile_(gate, up, "silu", 0.0, groups, *tally.arguments(), backend=refusing_backend)
    assert torch.equal(gate, before)
    assert all((value == 0).all() for value in tally.arguments())


@pytest.mark.parametrize("index", [3, -2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("at", [0, 5])
def test_a_group_out_of_range_counts_nowhere_and_shows_in_flags(index, at, skipping_backend):
    gate, up = LAYOUTS["contiguous"](torch.bfloat16)
    got, expected = Tally(3, 40), Tally(3, 40)
    groups = torch.tensor([0, 1, 1, 2, 2, 0], dtype=torch.int32)
    gate[at, 7] = NAN
    groups[at] = index
    product = run_profile(gate, up, "relu", groups, got, backend=skipping_backend)
    groups[at] = -1
    without = run_profile(gate, up, "relu", groups, expected, backend=skipping_backend)
    assert torch.equal(product.nan_to_num(), without.nan_to_num())
    for name in STATISTICS:
        assert torch.equal(getattr(got, name), getattr(expected, name))
    assert expected.flags.tolist() == [0, 0]
    assert got.flags.tolist() == [0, 1]


def test_one_group_out_of_range_for_all_rows_shows_once(skipping_backend):
    gate, up = LAYOUTS["tiles"](torch.bfloat16)
    tally = Tally(3, gate.shape[-1])
    groups = torch.tensor([3], dtype=torch.int32)
    run_profile(gate, up, "relu", groups, tally, backend=skipping_backend)
    assert tally.flags.tolist() == [0, 1]
    assert not any(getattr(tally, name).any() for name in STATISTICS)


@pytest.mark.parametrize("group", [0, 7, 2**31 - 1])
def test_without_statistics_any_group_has_its_nonfinite_activations_counted(group, backend):
    gate = torch.tensor([[1.0, NAN], [INF, -INF], [2.0, INF]])
    groups = torch.tensor([group, -1, group], dtype=torch.int32)
    for name in (backend, "reference"):
        flags = torch.zeros(2, dtype=torch.int64)
        ops.profile(
            gate, None, "identity", 0.0, groups, None, None, None, None, flags, backend=name
        )
        assert flags.tolist() == [2, 0]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_what_is_not_exact_is_within_the_stated_error(activation, dtype, backend):
    # docs/numerics.md: 4e-7 max(1, |x|) before the rounding to the dtype, which adds half a unit.
    gate = values(64, 256, dtype=dtype)
    tally = Tally(1, 256, ("counts",))
    got = run_profile(gate, None, activation, None, tally, backend=backend).double()
    exact = ops.ACTIVATIONS[activation](gate.double())
    unit = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = 4e-7 * gate.double().abs().clamp(min=1) + unit * exact.abs() * 1.01 + smallest
    assert ((got - exact).abs() <= allowed).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_new", "quick_gelu"])
def test_float32_activations_are_within_the_stated_error(activation, backend):
    gate = values(64, 256, dtype=torch.float32) * 4
    tally = Tally(1, 256, ("counts",))
    got = run_profile(gate, None, activation, None, tally, backend=backend).double()
    exact = ops.ACTIVATIONS[activation](gate.double())
    assert ((got - exact).abs() <= 4e-7 * gate.double().abs().clamp(min=1)).all()


WRONG = {
    "gate's dtype": ({"gate": torch.zeros(6, 40, dtype=torch.float64)}, "gate must be float32"),
    "sums' layout": (
        {"sums": torch.zeros(1, 80, dtype=torch.float64)[:, ::2]},
        "sums must be contiguous",
    ),
    "gate's shape": ({"gate": torch.zeros(())}, "gate must be"),
    "up's shape": ({"up": torch.zeros(6, 41, dtype=torch.bfloat16)}, "up must be"),
    "up's dimensions": ({"up": torch.zeros(2, 3, 40, dtype=torch.bfloat16)}, "up must be"),
    "up's dtype": ({"up": torch.zeros(6, 40)}, "up must be"),
    "activation": ({"activation": "swish"}, "activation must be one of identity, silu"),
    "threshold": ({"threshold": float("nan")}, "threshold must be a number"),
    "groups' number": ({"groups": torch.zeros(5, dtype=torch.int32)}, "groups must be"),
    "groups' dtype": ({"groups": torch.zeros(6, dtype=torch.int64)}, "groups must be"),
    "counts' dtype": ({"counts": torch.zeros(1, 40, dtype=torch.int32)}, "counts must be"),
    "counts' dimensions": (
        {"counts": torch.zeros(1, 1, 40, dtype=torch.int64)},
        "counts must be",
    ),
    "counts' width": ({"counts": torch.zeros(1, 39, dtype=torch.int64)}, r"counts must be .*40\]"),
    "groups differ": ({"sums": torch.zeros(2, 40, dtype=torch.float64)}, r"sums must be .*\[1, 40"),
    "squares' dtype": ({"square_sums": torch.zeros(1, 40)}, "square_sums must be"),
    "flags' shape": ({"flags": torch.zeros(3, dtype=torch.int64)}, r"flags must be .*\[2\]"),
    "flags' dimensions": ({"flags": torch.zeros(1, 2, dtype=torch.int64)}, "flags must be"),
    "device": ({"flags": torch.zeros(2, dtype=torch.int64, device="meta")}, "flags must be"),
    "backend": ({"backend": "fpga"}, "backend must be one of auto, "),
    "up_abs_sums without up": ({"up": None}, "up_abs_sums needs up"),
}


def test_on_a_cpu_the_library_s_own_check_is_the_only_one(monkeypatch, device):
    if torch.device(device).type != "cpu" or cpu.why_not("cpu"):
        pytest.skip("the C++ kernels do not serve here; `make test` has a CPU and them")

    def check(*arguments):
        raise AssertionError("checked twice")

    monkeypatch.setattr(declarations, "check_statistics", check)
    gate, up = LAYOUTS["contiguous"](torch.bfloat16)
    tally = Tally(1, 40)
    run_profile(gate, up, "silu", None, tally, backend="cpu")
    assert tally.counts.any()


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("faked", [False, True])
def test_wrong_arguments_are_refused_in_one_sentence_by_kernels_and_fakes(wrong, faked, device):
    changes, message = WRONG[wrong]
    changes = {
        name: value.to(device) if torch.is_tensor(value) and value.device.type == "cpu" else value
        for name, value in changes.items()
    }
    if faked and wrong in ("backend", "device"):
        pytest.skip("a fake asks no backend, and fake tensors of two devices are refused by torch")
    gate, up = LAYOUTS["contiguous"](torch.bfloat16)
    tally = Tally(1, 40)
    arguments = {
        "gate": gate, "up": up, "activation": "silu", "threshold": 0.0, "groups": None,
        "counts": tally.counts, "sums": tally.sums, "square_sums": tally.square_sums,
        "up_abs_sums": tally.up_abs_sums, "flags": tally.flags,
    } | changes  # fmt: skip
    if faked:
        mode = torch._subclasses.FakeTensorMode()
        arguments = {
            name: mode.from_tensor(value) if torch.is_tensor(value) else value
            for name, value in arguments.items()
        }
        with mode, pytest.raises(InputError, match=message):
            ops.profile(**arguments)
    else:
        with pytest.raises(InputError, match=message):
            ops.profile(**arguments)


@pytest.mark.parametrize(
    "gate",
    [
        lambda: torch.zeros(6, 80, dtype=torch.bfloat16)[:, ::2],
        lambda: torch.zeros(1, 40, dtype=torch.bfloat16).expand(6, 40),
        lambda: torch.zeros(3, 4, 40, dtype=torch.bfloat16)[:, :2],
    ],
    ids=["every other element", "one row six times", "two strides"],
)
def test_a_product_is_not_written_over_rows_that_no_single_stride_reaches(gate):
    tally = Tally(1, 40)
    with pytest.raises(InputError, match="profile_: gate must have a last stride of 1"):
        ops.profile_(gate(), None, "silu", 0.0, None, tally.counts, None, None, None, tally.flags)


def _ungated(tally: Tally) -> Tally:
    tally.up_abs_sums = None
    return tally


def test_groups_that_the_op_itself_overwrites_lead_nowhere_outside(backend):
    width = 64
    buffer = torch.zeros(100 * width, dtype=torch.int64)
    counts = buffer[: 2 * width].view(2, width)
    groups = counts.view(torch.int32).view(-1)
    groups[1] = groups[4] = groups[7] = 1
    gate, flags = torch.ones(groups.numel(), width), torch.zeros(2, dtype=torch.int64)
    ops.profile(
        gate, None, "identity", 0.0, groups, counts, None, None, None, flags, backend=backend
    )
    assert not buffer[2 * width :].any()
