"""Edits and shifts placed in a model, per sequence; edits folded into its weights."""

from lapefast.steering.fold import Fold, fold
from lapefast.steering.shifts import Shift
from lapefast.steering.steer import Steering, steer

__all__ = ["Fold", "Shift", "Steering", "fold", "steer"]
