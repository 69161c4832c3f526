"""Where Triton comes from, when it is imported, and what compiling for a GPU gives without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, **variables: str) -> str:
    """What a fresh Python prints that starts in the repository, with Triton's compiler on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_package_called_triton_kernels_is_not_shadowed(tmp_path):
    package = tmp_path / "triton_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    found = run("import triton_kernels; print(triton_kernels.__file__)", PYTHONPATH=str(tmp_path))
    assert found == str(package / "__init__.py")


def test_importing_the_ops_imports_no_kernels():
    assert run(
        "import sys, lapefast.ops; print([m for m in sys.modules if 'triton_kernels' in m])"
    ) == "[]"  # fmt: skip


def test_without_triton_the_backend_says_what_to_install():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from lapefast.ops import backends; print(backends.why_not('triton', 'cuda'))"
    )
    assert "install triton" in run(code)


def test_compiled_triton_refuses_cpu_tensors_in_one_sentence():
    pytest.importorskip("triton", reason="Triton is not installed; the test extra has it")
    reason = run("from lapefast.ops import backends; print(backends.why_not('triton', 'cpu'))")
    assert reason.endswith("with TRITON_INTERPRET=1 set.")


def test_aligned_kernels_move_16_bytes_and_divide_as_ieee_does(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed; the test extra has it")
    code = """
import torch
from lapefast.triton_kernels.ahead_of_time import TARGETS, compile_for
for target in TARGETS.values():
    for op in ("profile", "edit"):
        ptx = compile_for(target, op, torch.bfloat16, "silu").asm["ptx"]
        print(ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32"), "div.rn.f32" in ptx,
              any(word in ptx for word in ("div.full", "div.approx", "membar", "fence", ".local")))
"""
    lines = run(code, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert lines == ["2 1 True False"] * 6


def test_interpreted_kernels_are_not_compiled(interpreter):
    import torch

    from lapefast.triton_kernels.ahead_of_time import TARGETS, compile_for

    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_for(TARGETS["sm_90"], "profile", torch.bfloat16, "silu")
