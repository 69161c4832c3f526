"""How attention maps change without a dimension, against the formula written out in float64."""

from __future__ import annotations

import pytest
import torch

from lapefast import ops
from lapefast.errors import InputError
from lapefast.ops.backends import native


def assert_close(found, expected, length, spacings=8):
    """The norms of the changes agree as float32 maps allow.

    Every probability p is off by a few spacings of p, in each of the two maps, so the change's norm
    by that much of the map's norm, which is at most the root of its rows.
    """
    atol = spacings * torch.finfo(torch.float32).eps * length**0.5
    torch.testing.assert_close(found.sqrt(), expected.sqrt(), rtol=1e-6, atol=atol)


@pytest.fixture(autouse=True)
def _on_the_cpu(backend):
    if backend not in ("cpu", "reference"):
        pytest.skip("others have no kernel of their own: --backend cpu runs this")


def case(heads=4, key_heads=2, length=37, dimensions=8, seed=0, causal=True):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, length, dimensions, generator=generator)
    key = torch.randn(key_heads, length, dimensions, generator=generator)
    factor = dimensions**-0.5
    logits = query @ key.repeat_interleave(heads // key_heads, 0).transpose(1, 2) * factor
    if causal:
        logits.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return query, key, logits, factor


def formula(query, key, logits, factor, softcap=0.0):
    """Sum over the map of (softmax(S - factor q_c k_c) - softmax(S))^2, one c after the other."""
    query, key, logits = query.double(), key.double(), logits.double()
    served = len(query) // len(key)

    def softmax(values):
        capped = softcap * (values / softcap).tanh() if softcap else values
        return capped.masked_fill(values == -torch.inf, -torch.inf).softmax(-1).nan_to_num()

    scores = torch.zeros(query.shape[0], query.shape[2], dtype=torch.float64)
    for head in range(query.shape[0]):
        for c in range(query.shape[2]):
            taken = factor * torch.outer(query[head, :, c], key[head // served, :, c])
            change = softmax(logits[head] - taken) - softmax(logits[head])
            scores[head, c] = change.square().sum()
    return scores


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 70])
def test_it_equals_the_formula(length, key_heads, causal, backend):
    given = case(key_heads=key_heads, length=length, causal=causal)
    found = ops.leave_one_out(*given, backend=backend)
    assert found.dtype is torch.float64
    assert_close(found, formula(*given), given[0].shape[1])


def test_a_soft_cap_comes_after_what_is_taken_away(backend):
    given = case()
    found = ops.leave_one_out(*given, 5.0, backend=backend)
    assert_close(found, formula(*given, 5.0), given[0].shape[1])
    assert not torch.allclose(found, formula(*given))


def test_masks_of_any_kind_hold_and_rows_without_a_column_count_nothing(backend):
    query, key, logits, factor = case(length=40, causal=False)
    generator = torch.Generator().manual_seed(3)
    masked = torch.rand(40, 40, generator=generator) < 0.4
    masked[5] = masked[39] = True
    logits = logits.masked_fill(masked, -torch.inf)
    found = ops.leave_one_out(query, key, logits, factor, backend=backend)
    expected = formula(query, key, logits, factor)
    assert_close(found, expected, query.shape[1])


def test_large_scores_overflow_nowhere(backend):
    query, key, logits, factor = case()
    given = (query * 40, key * 40, logits * 1600, factor)
    found = ops.leave_one_out(*given, backend=backend)
    # Logits of thousands are off by some of their own spacings, 2^11 of those of 1.
    assert_close(found, formula(*given), query.shape[1], spacings=8 << 11)


def test_empty_tensors_give_no_scores_or_zeros(backend):
    for shape in ((0, 1, 5, 8), (2, 1, 0, 8), (2, 1, 5, 0)):
        heads, key_heads, length, dimensions = shape
        query, key = torch.zeros(heads, length, dimensions), torch.zeros(1, length, dimensions)
        logits = torch.zeros(heads, length, length)
        found = ops.leave_one_out(query, key, logits, 1.0, backend=backend)
        assert found.shape == (heads, dimensions)
        assert not found.any()


def test_views_of_any_strides_are_taken(backend):
    query, key, logits, factor = case()
    expected = ops.leave_one_out(query, key, logits, factor, backend=backend)
    turned = query.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([key, key], dim=2)[:, :, : key.shape[2]]
    found = ops.leave_one_out(turned, wide, logits, factor, backend=backend)
    assert torch.equal(found, expected)


def test_every_number_of_threads_gives_the_same_bits(backend):
    given = case(length=70)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.leave_one_out(*given, backend=backend))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpu":
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, s: (q.double(), k, s), "query must be float32"),
        (lambda q, k, s: (q[0], k, s), "query must be float32"),
        (lambda q, k, s: (q, k[..., :-1], s), "key must be float32"),
        (lambda q, k, s: (q, torch.cat([k, k[:1]]), s), "key must be float32"),
        (lambda q, k, s: (q, k, s[:, :-1]), "logits must be float32"),
        (lambda q, k, s: (q, k, s[..., :-1]), "logits must be float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, backend):
    query, key, logits, factor = case()
    with pytest.raises(InputError, match=message):
        ops.leave_one_out(*change(query, key, logits), factor, backend=backend)
    with pytest.raises(InputError, match="softcap must be"):
        ops.leave_one_out(query, key, logits, factor, -1.0, backend=backend)
    with pytest.raises(InputError, match="softcap must be"):
        ops.leave_one_out(query, key, logits, factor, float("inf"), backend=backend)


def test_scores_carry_no_gradient(backend):
    query, key, logits, factor = case()
    found = ops.leave_one_out(query.requires_grad_(), key, logits, factor, backend=backend)
    assert not found.requires_grad


def test_the_library_reads_and_writes_nothing_outside(backend):
    if backend != "cpu":
        pytest.skip("of the native library alone: --backend cpu runs this")
    query, keys = torch.zeros(4, 5, 8), torch.zeros(2, 8, 32)
    maps, ends = torch.zeros(4, 5, 32), torch.full((4, 5), 5, dtype=torch.int32)
    scores = torch.zeros(4, 8, dtype=torch.float64)
    good = [query, keys, maps, maps, ends, scores, 1]
    native.library.leave_one_out(*good)
    for place, wrong in (
        (0, query[:, :4]),
        (0, query[0]),
        (1, keys[..., :31]),
        (1, torch.zeros(3, 8, 32)),
        (1, torch.zeros(0, 8, 32)),
        (1, keys[:, :7]),
        (2, maps[..., :16]),
        (3, maps[:3]),
        (4, ends.long()),
        (4, ends + 28),
        (4, ends - 6),
        (5, scores.float()),
        (5, scores[:3]),
    ):
        with pytest.raises(InputError):
            native.library.leave_one_out(*good[:place], wrong, *good[place + 1 :])
