"""Profiles: what is known of a model's neurons over texts, its file, and the published files."""

from lapefast.profiles.profile import Over, Profile
from lapefast.profiles.shards import SHARDS
from lapefast.profiles.statistics import STATISTICS

__all__ = ["SHARDS", "STATISTICS", "Over", "Profile"]
