"""The tests run on the CPU backend, or on another: `--backend triton --device cuda`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers

# Helpers of the tests (`tests/models/families.py`) are imported as modules of their own.
sys.path.insert(0, str(Path(__file__).parent / "models"))
transformers.logging.set_verbosity_error()


def pytest_addoption(parser):
    parser.addoption("--backend", default="cpu", help="whose ops are tested")
    parser.addoption("--device", default="cpu", help="where the tensors of the ops' tests are")
    parser.addoption(
        "--native",
        help="a native library to test in place of the installed one: built with sanitizers, or "
        "with GPU kernels that run on a CPU, which `--backend cuda` then asks for",
    )


def pytest_configure(config):
    path = config.getoption("--native")
    if path:
        # Before anything has imported the installed one.
        assert "lapefast" not in sys.modules
        spec = importlib.util.spec_from_file_location("lapefast._native", path)
        sys.modules["lapefast._native"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["lapefast._native"])
        from lapefast.ops.backends import cuda, native

        assert native.library.__file__ == path
        if config.getoption("--backend") == "cuda":
            native.library.run_cuda_on_cpu()
            cuda.why_not = lambda device_type: None


@pytest.fixture(scope="session")
def backend(request) -> str:
    return request.config.getoption("--backend")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models gain nothing from more, and other work on the machine costs less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
