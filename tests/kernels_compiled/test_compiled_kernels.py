"""What only the compiled code shows: nothing in local memory, all data moved 16 bytes at a time.

No test of results sees these: a store split into four, or a register spilled, is merely slow.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass
from resources import TARGETS, cuda_cases, native_library

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


# A multiply and an add in one rounding.
CONTRACTED = ("FFMA", "FFMA2")


@pytest.fixture(scope="module", params=TARGETS)
def cases(request):
    """The CUDA kernels as compiled for one target."""
    if (library := native_library()) is None:
        pytest.skip("needs the native library: build it, without LAPEFAST_BUILD_NATIVE=0")
    try:
        return list(cuda_cases(library, request.param))
    except sass.SassError as error:
        if "does not contain device code" in str(error):
            pytest.skip("the native library has no CUDA kernels: build it where nvcc is on PATH")
        if "cuobjdump is missing" in str(error):
            pytest.skip(str(error))
        raise


def test_cuda_kernels_for_aligned_rows_have_no_fault(cases):
    for op in ("profile", "edit"):
        for dtype in ("Float32", "Float16", "BFloat16"):
            found = [case for case in cases if case.what.startswith(f"{op}_kernel<{dtype},")]
            assert {case.aligned for case in found} == {True, False}
    assert {case.what: case.faults for case in cases if case.aligned and case.faults} == {}
    # The same kernels, for rows that start anywhere, show that a fault would be seen.
    assert all("narrow" in str(case.faults) for case in cases if not case.aligned)


def test_a_float32_edit_by_cuda_rounds_its_product_before_it_adds(cases):
    codes = {case.what: case.kernel.code for case in cases}
    assert codes["edit_kernel<Float32, Known<identity>, 4>"].count(*CONTRACTED) == 0
    # erf and the like are written with them: they would be seen.
    assert codes["edit_kernel<Float32, Asked, 4>"].count(*CONTRACTED) > 0


# In a process of its own, because other tests may have had Triton interpret in this one.
COMPILE = """
import json, sys
import torch
from resources import TARGETS, triton_cases

everything = "counts", "sums", "square_sums", "up_abs_sums"
half, single = {"dtype": torch.bfloat16}, {"dtype": torch.float32}
cases = triton_cases(TARGETS, [
    {"op": "profile", "activation": "silu", "statistics": ("counts",), **half},
    {"op": "profile", "activation": "silu", "statistics": everything, **half},
    {"op": "profile", "activation": "gelu", "statistics": ("counts",), **half},
    {"op": "profile", "activation": "identity", "statistics": ("counts",), **single},
    {"op": "edit", "activation": "silu", **half},
    {"op": "edit", "activation": "identity", **single},
    {"op": "observe", "activation": "identity", "statistics": ("counts",), "gated": False, **half},
    {"op": "profile", "activation": "silu", "statistics": ("counts",), "aligned": False, **half},
])
json.dump(
    [
        [case.what, case.kernel.target, case.kernel.code.count(*sys.argv[1:]), case.faults]
        for case in cases
    ],
    sys.stdout,
)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: install lapefast[test]"
)
def test_triton_kernels_for_aligned_rows_have_no_fault_and_edits_round_as_cuda_s(tmp_path):
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(BENCHMARKS), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, *CONTRACTED]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    cases = json.loads(done.stdout)
    # The last is for rows that start anywhere: it shows that a fault would be seen.
    aligned, unaligned = cases[: -len(TARGETS)], cases[-len(TARGETS) :]
    assert len(aligned) == 7 * len(TARGETS)
    assert [case for case in aligned if case[-1]] == []
    assert all("narrow" in str(faults) for *_, faults in unaligned)
    # Contracted instructions would be seen too: libdevice's exp has some.
    counts = {what: [row[2] for row in cases if row[0] == what] for what, *_ in cases}
    assert counts["edit float32 identity gated"] == [0] * len(TARGETS)
    assert all(counts["edit bfloat16 silu gated"])
