"""What was built: symbols, and the package without the native library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "nm", "c++"))) or not (ROOT / "CMakeLists.txt").exists(),
    reason="needs cmake, nm and a C++ compiler",
)
def test_kernels_of_an_instruction_set_share_no_symbol_with_other_units(tmp_path):
    # A weak symbol compiled for AVX-512 could be picked by the linker for every other unit, which
    # then crashes on processors without it.
    subprocess.run(
        [
            "cmake",
            "-S",
            ROOT,
            "-B",
            tmp_path,
            "-DLAPEFAST_PYTHON=OFF",
            "-DLAPEFAST_CUDA=OFF",
            "-DCMAKE_BUILD_TYPE=Release",
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        ["cmake", "--build", tmp_path, "--parallel", "2"], check=True, capture_output=True
    )
    objects = list(tmp_path.rglob("kernels_*.o"))
    assert objects
    for path in objects:
        listed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        shared = [
            line
            for line in listed.stdout.splitlines()
            if len(fields := line.split(maxsplit=2)) == 3 and fields[1] in "VvWwui"
        ]
        assert shared == []
        defined = [
            line for line in listed.stdout.splitlines() if line.split()[-2:-1] in (["D"], ["R"])
        ]
        assert [line.split()[-1].split("::")[-1] for line in defined] == ["kernels"]


WITHOUT = """
import logging, sys
logging.basicConfig(format="%(message)s")
sys.modules["lapefast._native"] = None
import torch
from lapefast import ops
from lapefast.errors import InputError
flags = torch.zeros(2, dtype=torch.int64)
arguments = torch.ones(2, 4), None, "relu", 0.0, None, None, None, None, None, flags
for _ in range(2):
    assert torch.equal(ops.profile(*arguments), torch.ones(2, 4))
try:
    ops.profile(*arguments, backend="cpu")
except InputError as error:
    print(error)
"""


def test_without_the_native_library_the_reference_serves_and_says_so_once():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("Ops run on the slower reference backend") == 1
    assert "the native library is missing" in done.stdout
    assert "LAPEFAST_BUILD_NATIVE=0" in done.stdout


def test_the_doctor_names_the_backend_of_each_device_and_why_not_others():
    code = "from lapefast.doctor import diagnose; print(diagnose())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "device cpu: served by backend" in done.stdout
    broken = "import sys; sys.modules['lapefast._native'] = None; " + code
    done = subprocess.run(
        [sys.executable, "-c", broken], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert "device cpu: served by backend reference" in done.stdout
    assert "not by cpu: the native library is missing" in done.stdout
