"""The one harness: contenders in turn in one run, answers checked first, medians and quartiles.

`contest` times every contender in each round and in an order that changes, so that what slows the
machine down slows all of them; a ratio is the median of the rounds' own ratios. Successive calls
take different input sets. Beside a time stand its bytes or operations per second, and their share
of what a plain copy and a plain matrix product reach on this machine, measured first.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import SHAPES, TINY, Llama, build, multiplies_bfloat16
from reporting import Bench, Results, device_name, quartiles
from timing import Given, Timings, seconds_per_call

from lapefast.ops.backends import BACKENDS, why_not

_RESULTS = pytest.StashKey[Results]()
_QUICK_ROUNDS = 2


def pytest_addoption(parser):
    group = parser.getgroup("lapefast benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured")
    group.addoption(
        "--quick",
        action="store_true",
        help="tiny sizes: checks that every bench runs, writes nothing",
    )
    group.addoption("--results", type=Path, help="the file to write, if not the device's own")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "only_on(device, reason): a bench that says nothing on another device"
    )
    config.stash[_RESULTS] = Results(config.getoption("device"))


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        return
    for item in items:
        marker = item.get_closest_marker("only_on")
        if marker is not None and marker.args[0] != config.getoption("device"):
            item.add_marker(pytest.mark.skip(reason=marker.kwargs["reason"]))


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("device")


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("quick")


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def backend(request, device) -> str:
    reason = why_not(request.param, device)
    if reason is not None:
        pytest.skip(f"backend {request.param!r} is not for {device!r}: {reason}")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _two_threads(device):
    if device == "cpu":  # as many as the published figures; a GPU waits for its host
        torch.set_num_threads(2)


@dataclass(frozen=True)
class Limits:
    """What the machine reaches at its best."""

    bytes: float  # per second, read and written by a copy
    operations: float  # per second, of a bfloat16 matrix product


@pytest.fixture(scope="session", autouse=True)
def limits(request, device, quick, _two_threads) -> Limits:
    """A copy far beyond any cache and a large matrix product; they head the table."""
    bench = request.config.stash[_RESULTS].bench("limits")
    length = 1 << (20 if quick else 30)
    side = 64 if quick else {"cpu": 2048, "cuda": 8192}[device]
    if not quick and not multiplies_bfloat16(device):
        side = 512
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    measured = []
    for what, run, work, unit in (
        ("copy", lambda: target.copy_(source), 2 * length / 1e9, " GB/s"),
        ("bfloat16 matrix product", lambda: left @ right, 2 * side**3 / 1e12, " TFLOP/s"),
    ):
        run()
        rates = [work / seconds_per_call(device, run, [()] * 3) for _ in range(7)]
        bench.row(f"limit of the machine: {what}", rates, unit)
        measured.append(quartiles(rates)[1])
    return Limits(measured[0] * 1e9, measured[1] * 1e12)


@pytest.fixture(scope="session")
def llama(device, quick) -> Llama:
    """The model that whole passes are measured on, with random weights."""
    return build(TINY if quick else SHAPES[device], device)


@pytest.fixture
def report(request, device) -> Bench:
    """The bench's rows in the table and in the results file."""
    yield request.config.stash[_RESULTS].bench(request.node.nodeid.rpartition("/")[2])
    if device == "cuda":  # what a bench leaves would be missing in the next
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def contest(benchmark, report, device, quick, limits):
    def run(
        what: str,
        contenders: dict[str, Callable[..., object]],
        inputs: Sequence[Given],
        check: Callable[[], None],
        rounds: int = 7,
        repeat: int = 1,
        moved: float | None = None,
        operations: dict[str, float] | None = None,
        tokens: int | None = None,
        point: dict[str, object] | None = None,
        lead_in: bool = False,
    ) -> Timings:
        """Check the answer, then time ``contenders`` alternately.

        Args:
            what: heads every row.
            contenders: name -> what is called with one of ``inputs``.
            inputs: sets of inputs, taken in turn.
            check: raises where the answers are not what they should be.
            rounds: how often every contender is timed; ``repeat`` calls each.
            moved: bytes that a call has to read and write.
            operations: contender -> floating-point operations of a call, where they are known.
            tokens: tokens of a call.
            point: place on a scaling curve; such a contest adds no rows to the table.
            lead_in: begin each turn with a call that is not timed. Then the memory that a result
                takes is what the contender itself gave back, as in a model's layers, and not
                another's, which a cache may hold or not: that alone makes a factor of two.
        """
        check()
        if quick:
            rounds, repeat = _QUICK_ROUNDS, 1
        order, names, call = random.Random(0), list(contenders), 0
        seconds: dict[str, list[float]] = {name: [] for name in names}

        def one_round() -> None:
            nonlocal call
            before = inputs[(call - 1) % len(inputs)]
            given = [inputs[(call + i) % len(inputs)] for i in range(repeat)]
            call += repeat
            # Who comes after a contender that gives much memory back pays for getting it again.
            order.shuffle(names)
            for name in names:
                if lead_in:
                    contenders[name](*before)
                seconds[name].append(seconds_per_call(device, contenders[name], given))

        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
        for measured in seconds.values():
            del measured[0]  # the warm-up's
        report.seconds.update(seconds)
        if point is not None:
            report.point.update(point)
            return Timings(seconds)
        for name, measured in seconds.items():
            median = quartiles(measured)[1]
            rates = []
            if moved:
                rate = moved / median
                rates.append(f"{rate / 1e9:.3g} GB/s, {rate / limits.bytes:.0%} of copy")
            if name in (operations or {}):
                rate = operations[name] / median
                rates.append(f"{rate / 1e12:.3g} TFLOP/s, {rate / limits.operations:.0%} of peak")
            if tokens:
                rates.append(f"{tokens / median:,.0f} tokens/s")
            report.row(f"{what}: {name}", measured, "s", rate="; ".join(rates))
        return Timings(seconds)

    return run


def pytest_terminal_summary(terminalreporter, config):
    results, quick = config.stash[_RESULTS], config.getoption("quick")
    if not results.benches:
        return
    what = "quick run, measures nothing" if quick else device_name(results.device)
    terminalreporter.section(
        f"{what}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for line in results.lines(judged=not quick):
        terminalreporter.write_line(line)
    if not quick:
        terminalreporter.write_line(results.save(config.getoption("results")))
