"""Imports point down only, and importing the package does nothing surprising."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lapefast"

# From the bottom up; parts on one line may import each other, but not in a circle.
ORDER = [
    {"errors"},
    {"files", "sealed", "display", "labels", "ops"},
    {"corpus", "models", "neurons"},
    {"profiles"},
    {"recording", "engines"},
    {"profiling", "steering"},
    {"detect", "evaluate", "export", "train"},
    {"report"},
    {"doctor", "demo"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}


def part_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "lapefast" else None


def imports(path: Path):
    """Every lapefast module that a file imports, wherever in the file, but for type checking."""
    tree = ast.parse(path.read_text())
    hints = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if node in hints:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lapefast":
                yield from (f"lapefast.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    relative = path.relative_to(PACKAGE).with_suffix("")
    own = relative.parts[0]
    if own == "__main__":
        return
    for module in imports(path):
        other = part_of(module)
        if other in LEVEL and other != own:
            assert LEVEL[other] <= LEVEL[own], f"{relative} imports {module}, which stands above it"


def test_parts_of_one_level_do_not_import_in_a_circle():
    edges = {part: set() for part in LEVEL}
    for path in FILES:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(path):
            other = part_of(module)
            if own in LEVEL and other in LEVEL and other != own:
                edges[own].add(other)

    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        return any(
            other == goal or (other not in seen and reaches(other, goal, seen | {other}))
            for other in edges[start]
        )

    assert [part for part in edges if reaches(part, part)] == []


def test_every_part_has_its_place_in_the_order():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    assert parts - {"__main__"} <= set(LEVEL)


@pytest.mark.parametrize(
    ("imported", "spared"),
    [
        ("lapefast", ["torch", "transformers"]),
        # What reads results waits for neither the compiler nor the modelling code: seconds each.
        ("lapefast.detect", ["torch._dynamo", "transformers.modeling_utils"]),
        ("lapefast.cli.tables", ["torch._dynamo", "transformers.modeling_utils"]),
        ("lapefast.report", ["torch._dynamo", "transformers.modeling_utils"]),
    ],
)
def test_importing_loads_nothing_that_takes_long_and_is_not_needed(imported, spared):
    code = f"import sys, {imported}; print([name for name in {spared} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists():
    import lapefast

    for name in lapefast.__all__:
        assert getattr(lapefast, name) is not None
