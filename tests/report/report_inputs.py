"""What the made-up inputs of reports have in common: labels are names, text, other scripts."""

from __future__ import annotations

__all__ = ["FINGERPRINT", "LABELS", "LAYERS", "TOKENS", "WIDTH"]

LABELS = ["en", "中文", "العربية", "<script>alert(1)</script>"]
LAYERS, WIDTH, TOKENS = 3, 40, 1000
FINGERPRINT = "f" * 64
