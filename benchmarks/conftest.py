"""The one harness: contenders in turn in one run, answers checked first, medians and quartiles.

`contest` times every contender, lapefast among them, in each round and in an order that changes, so
that what slows the machine down slows all of them. Ratios are of medians over the rounds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

_ROWS: list[Row] = []


@dataclass
class Row:
    """One line of the printed table."""

    what: str
    bar: str
    measured: str
    reached: bool | None


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture
def contest(benchmark):
    """contest(ours, others, check, rounds) -> {name: [seconds]}, "lapefast" among them."""

    def run(
        ours: Callable[[], object],
        others: dict[str, Callable[[], object]],
        check: Callable[[], None],
        rounds: int = 7,
        repeat: int = 1,
    ) -> dict[str, list[float]]:
        check()
        order = random.Random(0)
        contenders = [*others.items(), ("lapefast", ours)]
        seconds: dict[str, list[float]] = {name: [] for name, _ in contenders}

        def one_round() -> None:
            # Who comes after a contender that gives much memory back pays for getting it again.
            order.shuffle(contenders)
            for name, contender in contenders:
                started = time.perf_counter()
                for _ in range(repeat):
                    contender()
                seconds[name].append((time.perf_counter() - started) / repeat)

        # What pytest-benchmark times and saves is lapefast once more; ratios come from the rounds.
        benchmark.pedantic(ours, setup=one_round, rounds=rounds, warmup_rounds=1)
        for measured in seconds.values():
            del measured[0]  # the warm-up's
        benchmark.extra_info["seconds"] = seconds
        benchmark.extra_info["threads"] = torch.get_num_threads()
        return seconds

    return run


@pytest.fixture
def report(benchmark):
    """report(what, bar, value, unit, at_least) adds a line to the table at the end."""

    def add(what: str, bar: float | None, value: float, unit: str, at_least: bool = True) -> None:
        word = "at least" if at_least else "at most"
        reached = None if bar is None else (value >= bar if at_least else value <= bar)
        _ROWS.append(
            Row(what, "" if bar is None else f"{word} {bar:g}{unit}", f"{value:.3g}{unit}", reached)
        )
        benchmark.extra_info.setdefault("table", []).append(vars(_ROWS[-1]))

    return add


def ratio(seconds: dict[str, list[float]], other: str) -> float:
    """How many times as long the other contender takes as lapefast: the ratio of the medians."""
    return statistics.median(seconds[other]) / statistics.median(seconds["lapefast"])


def pytest_terminal_summary(terminalreporter):
    if not _ROWS:
        return
    widths = [max(len(getattr(row, key)) for row in _ROWS) for key in ("what", "bar", "measured")]
    terminalreporter.section(f"{torch.get_num_threads()} threads, {_processor()}")
    for row in _ROWS:
        verdict = {True: "reached", False: "MISSED", None: ""}[row.reached]
        cells = (row.what, row.bar, row.measured)
        terminalreporter.write_line(
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            + f"  {verdict}"
        )


def _processor() -> str:
    with open("/proc/cpuinfo") as info:
        text = info.read()
    name = next((line.split(":")[1] for line in text.splitlines() if "model name" in line), "")
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in text]
    return f"{name.strip()} ({', '.join(units)}), torch {torch.__version__}"
