"""What the backend and the device of the tests (`--backend`, `--device`) mean for the ops."""

from __future__ import annotations

import contextlib

import numpy
import pytest
import torch


@pytest.fixture
def interpreted(backend, device) -> bool:
    """Whether Triton's interpreter computes, at 0.3 million elements a second."""
    return backend == "triton" and device.type == "cpu"


@pytest.fixture(params=["tested", "reference"])
def each_backend(request, backend) -> str:
    return backend if request.param == "tested" else "reference"


@pytest.fixture
def refusing_backend(each_backend, device) -> str:
    """One that refuses what is out of range before anything is written."""
    if not _refuses(each_backend, device):
        pytest.skip("it skips what is out of range: --backend cpu refuses it")
    return each_backend


@pytest.fixture
def skipping_backend(backend, device) -> str:
    """One that skips what is out of range and counts it in flags."""
    if _refuses(backend, device):
        pytest.skip("it refuses what is out of range: --backend triton and cuda skip it")
    return backend


def _refuses(backend: str, device: torch.device) -> bool:
    return backend in ("cpu", "reference") and device.type == "cpu"


@pytest.fixture(autouse=True)
def tensors_on_device(device):
    """Tensors that name no device are made where the tests run."""
    with contextlib.nullcontext() if device.type == "cpu" else device:
        # Triton's interpreter computes in NumPy, which warns of overflow and of NaN.
        with numpy.errstate(all="ignore"):
            yield
