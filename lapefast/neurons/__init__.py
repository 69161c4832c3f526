"""Neuron sets and edits: what detectors, steering, evaluation and export exchange."""

from __future__ import annotations

from lapefast.neurons.edits import Edit, activate, add, deactivate, scale
from lapefast.neurons.layout import Layout
from lapefast.neurons.sets import NeuronSet, NeuronSets

__all__ = [
    "Edit",
    "Layout",
    "NeuronSet",
    "NeuronSets",
    "activate",
    "add",
    "deactivate",
    "scale",
]
