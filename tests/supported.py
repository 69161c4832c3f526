"""Prints the rows of the README's supported table that say what the tests exercise.

python tests/supported.py

`tests/test_documents.py` compares them with the README.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "models"))

import families  # noqa: E402
import mixtures  # noqa: E402

_HEAD = re.compile(r"(For\w+|LMHeadModel|LMHead|Model|MTP)$")


def rows() -> list[str]:
    """The table's rows, from the families that the tests run and the versions they are run with."""
    dense = [family.model for family in families.FAMILIES]
    torch = _version("Makefile", "torch")
    new = _version("constraints.txt", "transformers")
    old = _version("tests/transformers4.sh", "transformers")
    return [
        f"| families, each in float32, bfloat16 and float16 | {_names(dense)} |",
        f"| mixtures of experts, each by {_listed(mixtures.IMPLEMENTATIONS)} | "
        f"{_names(mixture.name for mixture in mixtures.MIXTURES)} |",
        f"| versions | torch {torch}, transformers {new} and {old} |",
    ]


def _names(models) -> str:
    return ", ".join(dict.fromkeys(_HEAD.sub("", model) for model in models))


def _listed(names) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}"


def _version(file: str, name: str) -> str:
    """The version of a library that a file of the repository installs."""
    text = (ROOT / file).read_text("utf-8")
    return re.search(rf"\b{name}==([\d.]+\d)", text)[1]


if __name__ == "__main__":
    print("\n".join(rows()))
