"""Average precision of a 7B model's units, 500 texts of a label among 3,000."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from processes import run_alone
from sklearn import metrics

from lapefast.detect.average_precision.scores import average_precision_scores

_UNITS, _TEXTS, _POSITIVE = 1_359_872, 3000, 500  # all linear outputs of Llama-2-7B

_RUN = """
import pathlib, sys, tempfile, time
import numpy as np, torch
from lapefast.detect.average_precision.scores import average_precision_scores
torch.set_num_threads(2)
kind, units, texts, positive = sys.argv[1], *map(int, sys.argv[2:])
labels = np.arange(texts) < positive
with tempfile.TemporaryDirectory() as place:
    if kind == "map":
        file = pathlib.Path(place) / "means"
        file.touch()
        with open(file, "r+b") as opened:
            opened.truncate(units * texts * 4)
        scores = np.memmap(file, np.float32, "r", shape=(texts, units)).T
        expected = np.full(units, positive / texts)
    else:
        rng, shift = np.random.default_rng(0), 16
        values = rng.standard_normal(units * shift + texts, dtype=np.float32)
        scores = np.lib.stride_tricks.sliding_window_view(values, texts)[::shift][:units]
        expected = None
    started = time.perf_counter()
    found = average_precision_scores(scores, labels).numpy()
    seconds = time.perf_counter() - started
if expected is None:
    from sklearn.metrics import average_precision_score
    chosen = np.linspace(0, units - 1, 50, dtype=int)
    expected = np.array([average_precision_score(labels, scores[unit]) for unit in chosen])
    found = found[chosen]
assert np.abs(found - expected).max() < 1e-12, np.abs(found - expected).max()
print(seconds)
"""


@pytest.mark.only_on("cpu", reason="detection runs on the CPU, and `make bench` measures it")
def test_average_precision_and_a_loop_over_scikit_learn(contest, report, quick):
    labels = np.arange(_TEXTS) < _POSITIVE
    rng = np.random.default_rng(0)
    many, few = (64, 4) if quick else (8192, 256)  # a loop costs the same per unit however long
    inputs = [(rng.standard_normal((many, _TEXTS), dtype=np.float32),) for _ in range(2)]

    def loop(scores: np.ndarray) -> np.ndarray:
        return np.array([metrics.average_precision_score(labels, row) for row in scores[:few]])

    def lapefast(scores: np.ndarray) -> torch.Tensor:
        return average_precision_scores(scores, labels)

    def check() -> None:
        for rounded in (inputs[0][0], inputs[0][0].round(1)):  # without ties and with many
            assert np.abs(lapefast(rounded)[:few].numpy() - loop(rounded)).max() < 1e-12

    what = f"average precision over {_TEXTS:,} texts"
    names = (f"{many:,} units", f"{few:,} units in a loop over scikit-learn")
    timings = contest(
        what, dict(zip(names, (lapefast, loop), strict=True)), inputs, check, rounds=5
    )
    ratio = [seconds / few * many for seconds in timings.ratio(*reversed(names))]
    report.row(f"{what}: scikit-learn's time per unit over ours", ratio, "x", at_least=50)


@pytest.mark.only_on("cpu", reason="detection runs on the CPU, and `make bench` measures it")
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("windows", "random values, held as windows of one array"),
        ("map", "equal values, mapped from a file [texts, units] that is one hole"),
    ],
)
def test_all_units_of_a_7b_model(benchmark, report, quick, kind, values):
    """A process of its own, whose whole peak counts.

    The values as they are in practice, 15 GiB of them, would be the disk's benchmark; so time is
    judged on random ones that overlap, and memory on a file of that size that takes no room.
    """
    units = 20_000 if quick else _UNITS
    measured = []

    def measure() -> None:
        (seconds,), peak = run_alone(_RUN, kind, units, _TEXTS, _POSITIVE)
        measured.append((seconds, peak))

    benchmark.pedantic(measure, rounds=1, iterations=1)
    seconds, peaks = zip(*measured, strict=True)
    what = f"average precision of {units:,} units over {_TEXTS:,} texts, {values}"
    report.row(f"{what}: time", seconds, "s", at_most=300)
    report.row(
        f"{what}: peak memory of the process", [peak / 2**30 for peak in peaks], " GiB", at_most=4
    )
