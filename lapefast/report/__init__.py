"""Figures of what was found, and the report that holds them: one HTML file."""

from __future__ import annotations

from lapefast.report.figures import draw_matrix, draw_neurons, draw_stability
from lapefast.report.page import write_report
from lapefast.report.sections import Inputs

__all__ = ["Inputs", "draw_matrix", "draw_neurons", "draw_stability", "write_report"]
