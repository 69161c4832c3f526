"""Profiles: what is known of a model's neurons over texts, its file, and the published files."""

from lapefast.profiles.profile import STATISTICS, Over, Profile

__all__ = ["STATISTICS", "Over", "Profile"]
