"""LAPE on the counts of a 70B model."""

from __future__ import annotations

import pytest
from processes import run_alone

_RUN = """
import sys, time, torch, lapefast as lf
from lapefast.models import Site
layers, width, labels = int(sys.argv[1]), 28672, list("abcdefg")
generator = torch.Generator().manual_seed(0)
tokens = 99_999_744
sites = [Site(f"layers.{i}.mlp", width, "SiLU") for i in range(layers)]
counts = {
    site.name: torch.randint(tokens // 2, (len(labels), width), generator=generator)
    for site in sites
}
profile = lf.Profile(
    labels, sites, {"decoder": torch.full((len(labels),), tokens)}, {"counts": counts}, {}
)
started = time.perf_counter()
neurons = lf.detect.lape(profile)
seconds = time.perf_counter() - started
union = torch.zeros(layers, width, dtype=torch.bool)
for label in labels:
    for layer, chosen in enumerate(neurons.layers(label)):
        union[layer, chosen] = True
assert int(union.sum()) == round(0.01 * layers * width), int(union.sum())
print(seconds)
"""


@pytest.mark.only_on("cpu", reason="detection runs on the CPU, and `make bench` measures it")
def test_lape_of_80_layers(benchmark, report, quick):
    """A process of its own, whose whole peak counts: interpreter, counts and selection."""
    measured = []

    def measure() -> None:
        (seconds,), peak = run_alone(_RUN, 2 if quick else 80)
        measured.append((seconds, peak))

    benchmark.pedantic(measure, rounds=1 if quick else 3, iterations=1)
    seconds, peaks = zip(*measured, strict=True)
    what = "LAPE on 80 layers x 28,672 neurons x 7 labels"
    report.row(f"{what}: time", seconds, "s", at_most=3)
    report.row(
        f"{what}: peak memory of the process", [peak / 2**30 for peak in peaks], " GiB", at_most=2
    )
