"""What was measured: the table at the end of a run, and the results file."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import lapefast
from lapefast.files import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "transformers", "triton", "nnsight", "transformer-lens")
_TIMES = ((1.0, " s"), (1e-3, " ms"), (1e-6, " us"))


@dataclass
class Row:
    """One line of the table; the middle value is the one judged."""

    what: str
    measured: str
    quartiles: str = ""
    rate: str = ""
    bar: str = ""
    reached: bool | None = None
    values: list[float] | None = None  # lower quartile, median, upper quartile; times in seconds


@dataclass
class Bench:
    """What one bench adds to the results."""

    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # contender -> of each round
    point: dict[str, Any] = field(default_factory=dict)  # its place on a scaling curve

    def row(
        self,
        what: str,
        values: float | Sequence[float],
        unit: str,
        at_least: float | None = None,
        at_most: float | None = None,
        rate: str = "",
    ) -> None:
        """Add a measurement: one value, or one of each round, in ``unit`` (``s`` is scaled)."""
        low, middle, high = quartiles([values] if isinstance(values, int | float) else values)
        row = Row(what, _shown(middle, unit), rate=rate, values=[low, middle, high])
        if low < high:
            size, _ = _scale(middle, unit)
            row.quartiles = f"[{_number(low / size)}, {_number(high / size)}]"
        if at_least is not None:
            row.bar, row.reached = f"at least {_shown(at_least, unit)}", middle >= at_least
        if at_most is not None:
            row.bar, row.reached = f"at most {_shown(at_most, unit)}", middle <= at_most
        self.rows.append(row)

    def note(self, what: str, text: str) -> None:
        """Add a line that says something instead of measuring it."""
        self.rows.append(Row(what, text))


class Results:
    """Every bench of a run, on one device at one commit."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.benches: dict[str, Bench] = {}

    def bench(self, name: str) -> Bench:
        return self.benches.setdefault(name, Bench())

    def about(self) -> dict[str, Any]:
        """What must be equal for results to stand in one file."""
        versions = {"lapefast": lapefast.__version__}
        for package in _PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        status = _git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
        return {
            "commit": _git("rev-parse", "HEAD"),
            "dirty": None if status is None else bool(status),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "versions": versions,
        }

    def save(self, path: Path | None = None) -> str:
        """Write the results, over those of another commit, device or environment.

        Benches of the file that did not run now stay in it only if all of `about` is equal and
        nothing was uncommitted.

        Returns:
            What was written where, in words.
        """
        name = "cpu" if self.device == "cpu" else device_name(self.device).lower().replace(" ", "-")
        path = path or RESULTS / f"{name}.json"
        about = self.about()
        # A bench that failed added nothing.
        benches = {
            name: asdict(bench)
            for name, bench in self.benches.items()
            if bench.seconds or bench.rows
        }
        held = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if held.get("about") == about and about["dirty"] is False:
            benches = held["benches"] | benches
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            text = json.dumps({"about": about, "benches": benches}, indent=1)
            Path(temporary).write_text(text + "\n", "utf-8")
        changed = "" if about["dirty"] is False else ", with uncommitted changes"
        return f"written to {path}: commit {about['commit'] or 'unknown'}{changed}"

    def lines(self, judged: bool) -> list[str]:
        """The table, first what the machine can do at all."""
        rows = [row for bench in self.benches.values() for row in bench.rows]
        verdicts = {True: "reached", False: "MISSED", None: ""}
        cells = [
            (
                f"  {row.what.rpartition(': ')[2]}",
                row.measured,
                row.quartiles,
                row.rate,
                *((row.bar, verdicts[row.reached]) if judged else ()),
            )
            for row in rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines, heading = [], None
        for row, line in zip(rows, cells, strict=True):
            if heading != (heading := row.what.rpartition(": ")[0]):
                lines.append(heading)
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        curves = {bench.point["curve"] for bench in self.benches.values() if bench.point}
        if curves:
            lines.append(
                f"curves over {', '.join(sorted(curves))}: benchmarks/figures.py draws them"
            )
        return lines


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = next((line.split(":")[1] for line in text.splitlines() if "model name" in line), "")
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in text]
    return f"{name.strip() or platform.machine()} ({', '.join(units) or 'no vector units known'})"


def _shown(value: float, unit: str) -> str:
    size, unit = _scale(value, unit)
    return _number(value / size) + unit


def _scale(value: float, unit: str) -> tuple[float, str]:
    if unit != "s":
        return 1.0, unit
    return next((pair for pair in _TIMES if value >= pair[0]), _TIMES[-1])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _git(*arguments: str) -> str | None:
    """What git says, or None where this is no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
