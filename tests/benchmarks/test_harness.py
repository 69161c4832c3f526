"""What the harness promises: results of one commit, peaks of one process, curves drawn anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import figures
import pytest
import torch
from processes import run_alone
from reporting import Results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def about(monkeypatch):
    """What the next results are about; a test changes it as another commit would."""
    about = {"commit": "a" * 40, "dirty": False, "device": "a CPU", "threads": 2, "versions": {}}
    monkeypatch.setattr(Results, "about", lambda self: dict(about))
    return about


def saved(path: Path, name: str, value: float) -> dict:
    results = Results("cpu")
    results.bench(name).row(f"{name}: time", value, "s")
    results.save(path)
    return json.loads(path.read_text("utf-8"))


def test_a_bench_run_again_at_the_same_commit_replaces_its_own_rows_alone(about, tmp_path):
    path = tmp_path / "cpu.json"
    saved(path, "one", 1.0)
    saved(path, "two", 2.0)
    held = saved(path, "one", 3.0)
    assert {name: bench["rows"][0]["values"][1] for name, bench in held["benches"].items()} == {
        "one": 3.0,
        "two": 2.0,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"commit": "b" * 40},
        {"device": "another CPU"},
        {"versions": {"torch": "9"}},
        {"dirty": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_results_of_another_commit_device_or_environment_are_replaced(about, tmp_path, change):
    path = tmp_path / "cpu.json"
    saved(path, "one", 1.0)
    about.update(change)
    held = saved(path, "two", 2.0)
    assert held["about"] == about
    assert list(held["benches"]) == ["two"]


def test_uncommitted_results_are_not_added_to(about, tmp_path):
    path = tmp_path / "cpu.json"
    about["dirty"] = True
    saved(path, "one", 1.0)
    assert list(saved(path, "two", 2.0)["benches"]) == ["two"]


def test_the_median_is_judged_and_shown_with_its_quartiles():
    bench = Results("cpu").bench("one")
    bench.row("pass: time", [0.004, 0.001, 0.002, 0.003, 0.1], "s", at_most=0.002)
    row = bench.rows[0]
    assert (row.measured, row.quartiles, row.bar) == ("3 ms", "[2, 4]", "at most 2 ms")
    assert row.reached is False


def test_the_peak_memory_of_a_script_is_not_that_of_its_parent():
    held = torch.ones(256 << 20, dtype=torch.uint8)
    printed, peak = run_alone("import sys; print(sys.argv[1])", 7)
    assert printed == [7.0]
    assert 0 < peak < held.nbytes


def test_curves_are_drawn_from_a_results_file(about, tmp_path):
    results = Results("cpu")
    for x in (1, 16, 256):
        bench = results.bench(f"tokens-{x}")
        bench.point.update(curve="tokens", x=x)
        bench.seconds.update(lapefast=[1e-6 * x, 2e-6 * x], eager=[2e-6 * x, 4e-6 * x])
    results.save(tmp_path / "cpu.json")
    written = figures.draw(tmp_path / "cpu.json")
    assert [path.name for path in written] == ["cpu-scaling.png", "cpu-scaling.svg"]
    assert "tokens" in written[1].read_text("utf-8")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_bench_runs_and_checks_its_answers():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-o", "python_files=bench_*.py"]
    command += ["-o", "timeout=0", "-q", "--benchmark-quiet", "--quick"]
    # In one process, however these tests run: nothing is timed in several.
    alone = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout
