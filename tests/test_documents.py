"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import supported

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted(ROOT.glob("docs/*.md"))
# A path in backticks lies in the repository or in the package.
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
TARGET = re.compile(r"`make ([\w-]+)")
# Written by commands.
WRITTEN = {"demo-output/", "benchmarks/results/"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_a_document_exists(document):
    text = document.read_text("utf-8")
    for path in set(PATH.findall(text)) - WRITTEN:
        assert (ROOT / path).exists() or (ROOT / "lapefast" / path).exists(), path
    for path in LINK.findall(text):
        assert (document.parent / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_in_a_document_exists(document):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(TARGET.findall(document.read_text("utf-8"))) <= set(targets)


def test_the_readme_names_every_page():
    linked = set(LINK.findall((ROOT / "README.md").read_text("utf-8")))
    pages = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")}
    assert pages <= linked


def test_the_readme_says_what_the_tests_run():
    text = (ROOT / "README.md").read_text("utf-8")
    for row in supported.rows():
        assert row in text
