"""Edits placed in a model while it runs."""

from lapefast.steering.steer import Steering, steer

__all__ = ["Steering", "steer"]
