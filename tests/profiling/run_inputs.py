"""A tiny model and two labels' rows, the same in every process of a test."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from families import VOCABULARY, by_name


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return by_name("llama").build()


def corpora(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(5, VOCABULARY, (rows + rows // 3, 12), generator=generator)
    return {"en": draw[:rows], "zh": draw[rows:]}
