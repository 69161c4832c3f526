"""Figures of what was found."""

from lapefast.report.figures import draw_matrix, draw_neurons

__all__ = ["draw_matrix", "draw_neurons"]
