"""The reader of compiled kernels sees what it is there for, on kernels that have one fault each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import sass
from resources import TARGETS, Case, predicted_share


@pytest.fixture(scope="module")
def nvcc():
    if (found := shutil.which("nvcc")) is None:
        pytest.skip("needs nvcc on PATH: install the CUDA toolkit, 13.0 or newer")
    return found


@pytest.fixture(scope="module")
def library(nvcc, tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "examples.so"
    targets = [f"-gencode=arch={t.replace('sm', 'compute')},code={t}" for t in TARGETS]
    source = Path(__file__).with_name("examples.cu")
    command = [nvcc, "-O3", *targets, "-Xcompiler=-fPIC", "-shared", "-o", path, source]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request, library):
    everything = sass.read(library)
    return {kernel.name: kernel for kernel in everything if kernel.target == request.param}


@pytest.mark.parametrize("name", ["wide", "unrolled", "without_loop", "detours"])
def test_a_good_kernel_has_no_faults(kernels, name):
    assert kernels[name].faults(operands=2, product=True) == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("narrow_store", "narrow stores: bytes [8, 8]"),
        ("narrow_load", "narrow loads"),
        ("stack_array", "64 bytes of stack"),
        ("spilling", "local accesses"),
        ("fenced", "memory barriers"),
        ("calling", "calls a function"),
    ],
)
def test_a_fault_is_seen_and_no_other_with_it(kernels, name, fault):
    (found,) = kernels[name].faults(operands=2, product=True)
    assert fault in found


def test_accesses_of_single_elements_are_seen(kernels):
    loads, stores = kernels["element_wise"].faults(operands=2, product=True)
    assert "narrow loads: bytes [2, 2]" in loads
    assert "narrow stores: bytes [2]" in stores


def test_a_product_where_none_is_wanted_is_seen(kernels):
    (found,) = kernels["wide"].faults(operands=2, product=False)
    assert "stores" in found


def test_the_resources_are_those_that_the_compiler_allotted(kernels):
    assert kernels["spilling"].registers == 32  # 65,536 registers for 2 x 1024 threads
    assert kernels["spilling"].local_accesses > 100
    assert kernels["spilling"].stack > 0
    assert kernels["stack_array"].stack == 64
    assert kernels["wide"].stack == kernels["wide"].local_accesses == kernels["wide"].shared == 0


def test_the_main_loop_is_one_time_round(kernels):
    wide, unrolled = kernels["wide"].main_path, kernels["unrolled"].main_path
    assert (wide.loads, wide.stores) == ([16, 16], [16])
    assert (unrolled.loads, unrolled.stores) == ([16] * 4, [16] * 2)
    assert len(wide) < len(unrolled) < 2 * len(wide)
    assert wide.count("EXIT") == 0


def test_detours_are_left_out_of_the_main_loop(kernels):
    path, code = kernels["detours"].main_path, kernels["detours"].code
    assert sorted(path.loads) == [4, 16, 16]
    assert path.stores == [16]
    assert path.count("MUFU") == path.count("FCHK") == 4  # quotients, without their slow path
    assert path.count("RED", "REDG") == 0 < code.count("RED", "REDG")
    assert code.calls >= 4
    assert code.loads.count(4) > path.loads.count(4)  # the search


def test_instructions_and_bytes_are_counted_per_element(kernels):
    for name, vectors in (("wide", 1), ("unrolled", 2)):
        instructions, moved = Case(name, kernels[name], itemsize=2, operands=2).per_element
        assert instructions == len(kernels[name].main_path) / (8 * vectors)
        assert moved == 6
    assert Case("", kernels["element_wise"], itemsize=2, operands=2).per_element is None


def test_the_predicted_share_is_issue_over_memory_time():
    # 128 instructions of a thread are 4 of a warp, which one SM issues in a clock.
    assert predicted_share(128, 1, bandwidth=1, clock=1, sms=1) == 1
    assert predicted_share(128, 2, bandwidth=1, clock=1, sms=1) == 0.5
    assert predicted_share(128, 1, bandwidth=1, clock=2, sms=1) == 0.5
    assert predicted_share(128, 1, bandwidth=3, clock=1, sms=3) == 1


def test_a_cubin_is_read_from_its_bytes_and_names_are_readable(nvcc, tmp_path):
    source = tmp_path / "named.cu"
    source.write_text(
        "namespace outer { template <class T, int n> __global__ void kernel(T* p) { *p = n; } }"
        "template __global__ void outer::kernel<float, 3>(float*);"
    )
    cubin = tmp_path / "named.cubin"
    subprocess.run([nvcc, "-arch=sm_90", "-cubin", "-o", cubin, source], check=True)
    (kernel,) = sass.read(cubin.read_bytes())
    assert kernel.target == "sm_90"
    assert kernel.name in ("outer::kernel<float, 3>", "_ZN5outer6kernelIfLi3EEEvPT_")
    assert kernel.code.stores == [4]


def test_a_file_without_device_code_is_refused(tmp_path):
    path = tmp_path / "empty.so"
    path.write_bytes(b"")
    with pytest.raises(sass.SassError, match="empty.so"):
        sass.read(path)
