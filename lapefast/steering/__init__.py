"""Edits and shifts placed in a model, per sequence."""

from lapefast.steering.shifts import Shift
from lapefast.steering.steer import Steering, steer

__all__ = ["Shift", "Steering", "steer"]
