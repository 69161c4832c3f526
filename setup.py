"""Calls CMake for the native library; everything else stands in pyproject.toml.

LAPEFAST_BUILD_NATIVE=0 leaves the library out: ops then run on the reference backend.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        source = Path(__file__).resolve().parent
        generator = ["-G", "Ninja"] if _has("ninja") else []
        _run(
            ["cmake", "-S", str(source), "-B", str(build), *generator]
            + shlex.split(os.environ.get("CMAKE_ARGS", ""))
            + [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        )
        _run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
        _run(["cmake", "--install", str(build), "--prefix", str(package)])


def _has(tool: str) -> bool:
    try:
        return subprocess.run([tool, "--version"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        sys.exit(
            "CMake is needed to build lapefast's native library: install cmake, or set "
            "LAPEFAST_BUILD_NATIVE=0 for a slower package without it."
        )
    except subprocess.CalledProcessError as error:
        sys.exit(f"Building lapefast's native library failed in: {' '.join(error.cmd)}")


NATIVE = os.environ.get("LAPEFAST_BUILD_NATIVE", "1") != "0"

# Kernel people look for Triton sources in `triton_kernels/`, but another project owns that
# importable name: without an `__init__.py` there, and installed under ours, no name is shadowed.
setup(
    packages=[*find_packages(include=["lapefast*"]), "lapefast.triton_kernels"],
    package_dir={"lapefast.triton_kernels": "triton_kernels/src"},
    ext_modules=[Extension("lapefast._native", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
)
