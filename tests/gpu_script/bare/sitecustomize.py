"""A Python that has the distributions named in LAPEFAST_ONLY, what they require, and lapefast.

What else is installed is neither imported nor listed.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from importlib.metadata import DistributionFinder
from itertools import chain

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def with_requirements(names: list[str]) -> set[str]:
    found: set[str] = set()
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for one in map(Requirement, requires):
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                left.append(one.name)
    return found


class Bare(DistributionFinder):
    """All finders that there were, less what is hidden."""

    def __init__(self, kept: set[str]) -> None:
        self._kept = kept
        self._hidden = {
            module
            for module, owners in importlib.metadata.packages_distributions().items()
            if not any(canonicalize_name(owner) in kept for owner in owners)
        }
        self._finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self._hidden:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self._finders)
        return next((spec for spec in specs if spec is not None), None)

    def find_distributions(self, context=DistributionFinder.Context()):  # noqa: B008
        finders = [one for one in self._finders if hasattr(one, "find_distributions")]
        found = chain.from_iterable(one.find_distributions(context) for one in finders)
        return (one for one in found if canonicalize_name(one.metadata["Name"]) in self._kept)


# coverage may be measuring; it has begun by now.
only = with_requirements(os.environ["LAPEFAST_ONLY"].split())
sys.meta_path[:] = [Bare(only | {"lapefast", "coverage"})]
