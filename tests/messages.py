"""Which sentences about bad input no test reaches, from the coverage data of the test run.

Run by `make test-all` after its tests; names them and exits with 1, but for those in `ELSEWHERE`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import coverage

ROOT = Path(__file__).parents[1]

# Functions that hold sentences which this run cannot reach, and why.
ELSEWHERE = {
    ("recording/checks.py", "check_flags"): "a GPU alone skips an index and counts it: `make gpu`",
    ("recording/recorder.py", "Recorder._reached"): "a placement that never fires is refused",
    ("ops/backends/triton.py", "_matrices"): "`make test-triton`",
}


def sentences(path: Path) -> Iterator[tuple[str, int]]:
    """Function and line of every `raise InputError(...)` and `return InputError(...)` of a file."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            name = f"{function}.{child.name}".lstrip(".") if inside else function
            if isinstance(child, (ast.Raise, ast.Return)):
                made = child.exc if isinstance(child, ast.Raise) else child.value
                of = made.func if isinstance(made, ast.Call) else None
                if isinstance(of, ast.Name) and of.id == "InputError":
                    yield function, child.lineno
            yield from walk(child, name)

    return walk(ast.parse(path.read_text("utf-8")), "")


def main() -> int:
    reached = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"))
    reached.load()
    data = reached.get_data()
    lines = {(ROOT / file).resolve(): set(data.lines(file) or ()) for file in data.measured_files()}
    every = [
        (path, function, line)
        for path in sorted((ROOT / "lapefast").rglob("*.py"))
        for function, line in sentences(path)
    ]
    missed = [
        f"{path.relative_to(ROOT)}:{line} in {function}"
        for path, function, line in every
        if line not in lines.get(path.resolve(), ())
        and (path.relative_to(ROOT / "lapefast").as_posix(), function) not in ELSEWHERE
        and "vllm" not in (*path.parts, path.stem)  # `make test-vllm`, in an environment of its own
    ]
    print(f"{len(every) - len(missed)} of {len(every)} sentences about bad input are reached")
    print("\n".join(missed), end="\n" if missed else "")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
