"""LAPE on the counts of a 70B model."""

from __future__ import annotations

import subprocess
import sys

_RUN = """
import resource, sys, time, torch, lapefast as lf
from lapefast.models import Site
layers, width, labels = 80, 28672, list("abcdefg")
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
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
neurons = lf.detect.lape(profile)
seconds = time.perf_counter() - started
union = torch.zeros(layers, width, dtype=torch.bool)
for label in labels:
    for layer, chosen in enumerate(neurons.layers(label)):
        union[layer, chosen] = True
assert int(union.sum()) == round(0.01 * layers * width), int(union.sum())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, peak * 1024)
"""


def test_lape_of_80_layers(benchmark, report):
    """A process of its own, whose whole peak counts: interpreter, counts and selection."""

    def measure() -> tuple[float, float]:
        command = [sys.executable, "-c", _RUN]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds, peak = map(float, printed.split())
        return seconds, peak

    seconds, peak = benchmark.pedantic(measure, rounds=3, iterations=1)
    what = "LAPE on 80 layers x 28,672 neurons x 7 labels"
    report(f"{what}: time", 3, seconds, " s", at_least=False)
    report(f"{what}: peak memory of the process", 2, peak / 2**30, " GiB", at_least=False)
