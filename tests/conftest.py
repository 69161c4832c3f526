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
        "--cuda-on-cpu", help="a native library whose GPU kernels run on a CPU, to test `cuda` with"
    )


def pytest_configure(config):
    path = config.getoption("--cuda-on-cpu")
    if path:
        # In place of the installed one, before anything has imported that.
        assert "lapefast" not in sys.modules
        spec = importlib.util.spec_from_file_location("lapefast._native", path)
        sys.modules["lapefast._native"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["lapefast._native"])
        from lapefast.ops.backends import cuda, native

        assert native.library.__file__ == path
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
