"""The overlap that is announced is met with far more text, in at least 9 of 10 trials."""

from __future__ import annotations

import pytest
from stability import CASES, Case, demo, stopped, synthetic

SMALL = [
    Case(3, 2000, 128, 32, 0.02),
    Case(5, 6000, 64, 64, 0.02),
    Case(7, 3000, 256, 64, 0.05),
]


def assert_met(trials):
    assert len(trials) >= 10
    # All labels of a trial, and not by announcing nothing.
    assert sum(all(one.met) for one in trials) >= 0.9 * len(trials)
    announced = [each for one in trials for each in one.stability.announced.values()]
    actual = [each for one in trials for each in one.actual.values()]
    assert sum(announced) > 0.5 * sum(actual)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_known_probabilities(case):
    assert_met([synthetic(case, seed) for seed in range(10)])


def test_the_expected_overlap_is_the_mean_of_those_that_come_true():
    trials = [synthetic(SMALL[1], 100 + seed) for seed in range(20)]
    actual = sum(sum(one.actual.values()) for one in trials) / 100
    expected = sum(float(one.stability.expected[-1].sum()) for one in trials) / 100
    # 100 overlaps of about 12 neurons each: the mean's standard error is about 0.01.
    assert expected == pytest.approx(actual, abs=0.03)


def test_a_pass_that_stops_by_itself_has_met_its_target():
    target = 0.8
    runs = [stopped(Case(3, 20000, 256, 0, 0.02), seed, target, 2**12) for seed in range(10)]
    assert None not in runs  # it does stop
    trials = [trial for trial, _ in runs]
    assert_met(trials)
    assert sum(min(one.actual.values()) >= target for one in trials) >= 9
    assert all(rows > 8 for _, rows in runs)  # not before there is anything to tell by


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_known_probabilities_of_larger_models(case):
    assert_met([synthetic(case, seed) for seed in range(10)])


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_portions_of_text_read_by_the_demo_model():
    for _, trials in demo(portions=24):
        if len(trials) >= 10:
            assert_met(trials)
