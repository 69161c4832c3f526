"""Parts of one text, counted by jobs that know nothing of each other."""

from __future__ import annotations

import functools
import itertools
import operator

import pytest
import run_inputs
import torch
from test_survival import profiled

from lapefast import Profile
from lapefast.errors import InputError

ROWS = 23


@pytest.mark.parametrize(("parts", "batch_size"), [(2, 2), (3, 5), (5, 1)])
def test_parts_add_up_to_the_whole_in_any_order(tmp_path, parts, batch_size):
    model = run_inputs.model()
    whole = profiled(model, ROWS, batch_size=batch_size)
    made = []
    for number in range(1, parts + 1):
        path = tmp_path / f"{number}.safetensors"
        profiled(model, ROWS, batch_size=batch_size, part=(number, parts)).save(path)
        made.append(Profile.load(path))
    for one in made:
        said = [entry["tokens"] for entry in one.metadata["corpora"]]
        assert said == one.tokens.tolist()
    for order in itertools.islice(itertools.permutations(made), 6):
        merged = functools.reduce(operator.add, order)
        assert torch.equal(merged.tokens, whole.tokens)
        for site, counts in whole.counts.items():
            assert torch.equal(merged.counts[site], counts)
            torch.testing.assert_close(merged.sums[site], whole.sums[site], rtol=1e-12, atol=1e-12)


def test_a_part_goes_on_after_a_stop(tmp_path):
    from test_survival import Breaks, Broken, assert_equal

    model = run_inputs.model()
    expected = profiled(model, ROWS, part=(2, 3))
    with Breaks(model, 4, Broken()), pytest.raises(Broken):
        profiled(model, ROWS, part=(2, 3), resume=tmp_path / "run")
    with pytest.raises(InputError, match="part: 2, 3 there, 1, 3 here"):
        profiled(model, ROWS, part=(1, 3), resume=tmp_path / "run")
    assert_equal(profiled(model, ROWS, part=(2, 3), resume=tmp_path / "run"), expected)


def test_what_does_not_belong_together_is_refused():
    model = run_inputs.model()
    part = functools.partial(profiled, model, ROWS)
    first = part(part=(1, 3))
    for other in (part(part=(1, 3)), part()):
        for one, two in ((first, other), (other, first)):
            with pytest.raises(InputError, match="would be counted twice for label 'en'"):
                one + two
    for other, way in (
        (part(part=(2, 4)), "part 2 of 4 .batches of 2 rows of 12"),
        (part(part=(2, 3), batch_size=3), "part 2 of 3 .batches of 3 rows of 12"),
        (
            part(part=(2, 3), max_tokens=120),
            "part 2 of 3 .batches of 2 rows of 12, max_tokens 120",
        ),
    ):
        with pytest.raises(InputError, match=f"were not made in one way .* and {way}"):
            first + other
    first + part(part=(3, 3))


def test_a_part_without_a_batch_is_said():
    with pytest.raises(InputError, match="part 25 of 25 has no batch of 2 rows"):
        profiled(run_inputs.model(), part=(25, 25))


def test_parts_need_to_know_what_a_batch_is():
    with pytest.raises(InputError, match="part needs a batch_size, the same in all jobs"):
        profiled(run_inputs.model(), batch_size=None, part=(1, 2))


@pytest.mark.parametrize("part", [(0, 3), (4, 3), (1, 0)])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(InputError, match="part must be .i, n. with 1 <= i <= n"):
        profiled(run_inputs.model(), part=part)
