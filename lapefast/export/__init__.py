"""Edited models for other programs: a checkpoint, an adapter, a file of edits."""

from __future__ import annotations

from lapefast.export.checkpoint import checkpoint
from lapefast.export.edits import edits
from lapefast.export.lora import lora

__all__ = ["checkpoint", "edits", "lora"]
