from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest

# Inputs for the ops, which the tests of the ops use too.
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))


@pytest.fixture
def interpreter():
    """Triton's interpreter; it computes in NumPy, which warns of overflow and of NaN."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1, set before Triton is imported")
    from triton.runtime import interpreter

    with numpy.errstate(all="ignore"):
        yield interpreter
