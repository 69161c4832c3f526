"""What a command reads, it does not write over."""

from __future__ import annotations

import pytest

COMMANDS = {
    "profile, a file": ["profile", "model", "--corpus", "en=read.txt"],
    "profile, by its name": ["profile", "model", "--corpus", "en=./read.txt"],
    "profile, a pattern": ["profile", "model", "--corpus", "en=*.txt"],
    "profile, a directory": ["profile", "model", "--corpus", "en=."],
    "profile, by its name at home": ["profile", "model", "--corpus", "en=~/read.txt"],
    "profile, a name with brackets": ["profile", "model", "--corpus", "en=[read].txt"],
    "profile, a directory with links": ["profile", "model", "--corpus", "en=linked"],
    "profile, a data set": ["profile", "model", "--corpus", "en=.::"],
    "profile, by a link": ["profile", "model", "--corpus", "en=link.txt"],
    "evaluate, neurons": ["evaluate", "model", "--neurons", "read.txt", "--corpus", "en=de.txt"],
    "merge": ["merge", "de.txt", "read.txt"],
    "identify": ["identify", "read.txt"],
    "prune": ["prune", "model", "--experts", "read.txt", "--corpus", "en=de.txt"],
    "sample": ["sample", "model", "--neurons", "read.txt"],
    "sweep": ["sweep", "model", "--neurons", "read.txt", "--profile", "de.txt"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_file_that_is_read_is_not_written_over(lapefast, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("read.txt", "de.txt"):
        (tmp_path / name).write_text("kept")
    for name in ("link.txt", "[read].txt"):
        (tmp_path / name).symlink_to("read.txt")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "up").symlink_to(tmp_path)
    result = lapefast(*arguments, "-o", "read.txt")
    assert result.code == 2
    assert "cannot write read.txt: it is read, too; give another name" in result.err
    assert (tmp_path / "read.txt").read_text() == "kept"


def test_a_figure_is_not_written_over_what_is_read(lapefast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "read.svg").write_text("kept")
    result = lapefast("stability", "read.svg", "-o", "s.json", "--figure", "read.png")
    assert result.code == 2
    assert "cannot write read.svg: it is read, too; give another name" in result.err


def test_a_file_beside_what_is_read_is_written_again(lapefast, tmp_path, monkeypatch):
    """Here the text is missing, which is what stops it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "p.safetensors").write_text("an earlier one")
    result = lapefast("profile", "model", "--corpus", "en=none.txt", "-o", "model/p.safetensors")
    assert result.code == 2
    assert "it is read" not in result.err
