"""Neuron sets and edits: what detectors, steering, evaluation and export exchange."""

from __future__ import annotations

from lapefast.neurons.compare import Comparison, compare
from lapefast.neurons.edit_files import NamedEdits, load_edits, save_edits
from lapefast.neurons.edits import Edit, activate, add, bind_all, deactivate, scale
from lapefast.neurons.layout import Layout
from lapefast.neurons.sets import NeuronSet, NeuronSets

__all__ = [
    "Comparison",
    "Edit",
    "Layout",
    "NamedEdits",
    "NeuronSet",
    "NeuronSets",
    "activate",
    "add",
    "bind_all",
    "compare",
    "deactivate",
    "load_edits",
    "save_edits",
    "scale",
]
