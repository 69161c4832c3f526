"""Training chosen neurons alone."""

from __future__ import annotations

from lapefast.train.mask import neuron_mask

__all__ = ["neuron_mask"]
