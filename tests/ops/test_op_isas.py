"""Every instruction set gives the same bits, and any number of threads does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading

import pytest
import torch
from op_cases import DTYPES, LAYOUTS, Tally, edits_for, row_groups, run_edit, run_profile, values

from lapefast import _native, ops


def digest_of(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        # Which NaN an operation on two gives is the compiler's choice of their order.
        if tensor.is_floating_point():
            tensor = tensor.masked_fill(tensor.isnan(), float("nan"))
        plain = tensor.contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


def everything() -> dict[str, str]:
    """Digests of all results that this process computes, by what they are of."""
    found = {}
    for dtype in DTYPES:
        for activation in ops.ACTIVATIONS:
            results = []
            for layout in ("tiles", "unaligned", "pages"):
                gate, up = LAYOUTS[layout](dtype)
                rows, width = gate.shape
                tally = Tally(3, width)
                results.append(run_profile(gate, up, activation, row_groups(rows, 3), tally))
                results += tally.arguments()
                sets = (torch.arange(rows) % 5 - 1).to(torch.int32)
                tables = edits_for(width).tables()
                results.append(run_edit(gate, up, activation, sets, tables))
            if dtype is not torch.float32:
                bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
                tally = Tally(1, 65536, ("counts", "sums", "square_sums"))
                results.append(run_profile(bits[None], None, activation, None, tally))
                results += tally.observed()
            found[f"{activation}:{dtype}"] = digest_of(results)
    return found


def everything_on(isa: str, threads: int = 1) -> list[str]:
    done = subprocess.run(
        [sys.executable, __file__, str(threads)],
        env=os.environ | {"LAPEFAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *rest = done.stdout.splitlines()
    assert first == isa
    return rest


def test_every_instruction_set_gives_the_same_bits_and_so_do_three_threads():
    isas = _native.available_isas()
    if len(isas) < 2:
        pytest.skip("this processor has one of the instruction sets; one with AVX2 compares two")
    expected = everything_on(isas[0])
    assert len(expected) == len(DTYPES) * len(ops.ACTIVATIONS)
    for isa in isas[1:]:
        assert everything_on(isa) == expected
    assert everything_on(isas[-1], threads=3) == expected


def test_an_unknown_instruction_set_is_refused_with_the_names_of_the_known():
    code = "from lapefast import _native; _native.isa()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LAPEFAST_CPU_ISA": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "LAPEFAST_CPU_ISA must be one of baseline" in done.stderr


def test_several_python_threads_share_statistics():
    gate, up = values(40, 3000, dtype=torch.bfloat16), values(40, 3000, dtype=torch.bfloat16)
    shared, once = Tally(2, 3000), Tally(2, 3000)
    groups = (torch.arange(40) // 3 % 2).to(torch.int32)
    expected = run_profile(gate, up, "silu", groups, once)
    wrong = []

    def work() -> None:
        for _ in range(25):
            if not torch.equal(run_profile(gate, up, "silu", groups, shared), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert torch.equal(shared.counts, once.counts * 100)
    # Each of the 100 calls adds at most 40 float64, each addition rounded by at most 2^-53 of a
    # running sum that never exceeds all absolute values together.
    all_together = 100 * torch.nn.functional.silu(gate).abs().double().sum(0)
    assert ((shared.sums - once.sums * 100).abs() <= 100 * 40 * 2**-53 * all_together).all()


@pytest.mark.parametrize("wanted", [("counts", "sums"), ("sums",), ("square_sums",)])
def test_calls_of_different_sizes_share_statistics(wanted):
    width, calls = 2048, 200
    held = {
        name: torch.zeros(2, width, dtype=torch.int64 if name == "counts" else torch.float64)
        for name in wanted
    }
    statistics = [held.get(name) for name in ("counts", "sums", "square_sums")]

    def work(rows: int) -> None:
        # One size shares out rows between threads and the other columns.
        torch.set_num_threads(2)
        gate, groups = torch.ones(rows, width), (torch.arange(rows) % 2).int()
        flags = torch.zeros(2, dtype=torch.int64)
        for _ in range(calls):
            ops.observe(gate, "identity", 0.0, groups, *statistics, flags)

    workers = [threading.Thread(target=work, args=(rows,)) for rows in (256, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for statistic in held.values():
        assert (statistic == calls * (256 + 20) / 2).all()


def test_only_the_openmp_runtime_of_torch_is_in_the_process():
    code = (
        "import sys, torch\n"
        "def runtimes():\n"
        "    words = open('/proc/self/maps').read().split()\n"
        "    names = ('gomp', 'iomp', 'libomp')\n"
        "    return {word for word in words if any(name in word for name in names)}\n"
        "before = runtimes()\n"
        "from lapefast import _native, ops\n"
        "gate = torch.ones(64, 4096)\n"
        "torch.set_num_threads(2)\n"
        "flags = torch.zeros(2, dtype=torch.int64)\n"
        "ops.profile(gate, None, 'relu', 0.0, None, None, None, None, None, flags)\n"
        "print(_native.has_thread_pool(), runtimes() == before, len(before))\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc, which Linux has")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1"]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(_native.isa())
    for name, digest in everything().items():
        print(name, digest)
