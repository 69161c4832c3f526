from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

# Helpers of the tests (`tests/models/families.py`) are imported as modules of their own.
sys.path.insert(0, str(Path(__file__).parent / "models"))
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models gain nothing from more, and other work on the machine costs less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
