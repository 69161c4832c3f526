from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch

from lapefast.errors import InputError
from lapefast.files import existing_file, read_torch, write_atomically, write_torch


@contextmanager
def no_file_over_4_kilobytes():
    """The kernel refuses to let a file grow, as it does on a full disk; needs no privilege.

    Only around the writing itself: what the tests print may go to a file, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "result"
    with write_atomically(target) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("all of it")
        assert not target.exists()
    assert target.read_text() == "all of it"
    assert os.listdir(tmp_path) == ["result"]


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "result"
    target.write_text("old")

    def write_half():
        with write_atomically(target) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_a_disk_that_fills_while_writing_is_named_and_leaves_nothing(tmp_path):
    named = pytest.raises(InputError, match=r"cannot write .*result")
    with no_file_over_4_kilobytes(), named, write_atomically(tmp_path / "result") as temporary:
        temporary.write_bytes(bytes(5000))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_while_flushing_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "result"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    named = pytest.raises(InputError, match=r"result: no space left on device; nothing was changed")
    with named, write_atomically(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_torch_files_are_written_all_or_none_on_a_full_disk(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    named = pytest.raises(InputError, match=r"cannot write .*large")
    with no_file_over_4_kilobytes(), named:
        write_torch({small: torch.zeros(2), large: torch.zeros(5000)})
    assert os.listdir(tmp_path) == []


def test_a_missing_directory_a_directory_and_a_device_are_refused(tmp_path):
    for path, reason in [
        (tmp_path / "missing" / "result", "does not exist"),
        (tmp_path, "not a regular file"),
        ("/dev/null", "not a regular file"),
    ]:
        with pytest.raises(InputError, match=reason), write_atomically(path):
            pass
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_new_file_is_as_readable_as_the_user_wants_and_an_old_one_keeps_its_mode(tmp_path):
    target = tmp_path / "result"
    before = os.umask(0o027)
    try:
        with write_atomically(target):
            pass
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        target.chmod(0o600)
        with write_atomically(target):
            pass
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with write_atomically(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_missing_file_is_named_with_what_it_should_be(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the profile .*absent: no such file"):
        existing_file(tmp_path / "absent", "profile")
    with pytest.raises(InputError, match="is a directory"):
        existing_file(tmp_path, "profile")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_lists_dicts_and_numbers_are_read_in_both_formats(tmp_path, zipped):
    content = [{"n": 3, "x": torch.arange(4)}, [1.5, OrderedDict(a=2)]]
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    read = read_torch(tmp_path / "file", "count file")
    assert torch.equal(read[0].pop("x"), torch.arange(4))
    assert read == [{"n": 3}, [1.5, {"a": 2}]]


@pytest.mark.parametrize(
    "content",
    [
        Fraction(1, 2),
        torch.nn.Linear(1, 1),
        ["text"],
        [None],
        [True],
        {"a": (1, 2)},
        {1.5: 1},
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=lambda content: type(content).__name__,
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_anything_else_in_a_torch_file_is_refused(tmp_path, content, zipped):
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="tensors, lists, dicts and numbers alone"):
        read_torch(tmp_path / "file", "count file")


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save([Malicious()], tmp_path / "file")
    with pytest.raises(InputError, match="something else"):
        read_torch(tmp_path / "file", "count file")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_torch_file_cut_short_anywhere_is_refused(tmp_path, zipped):
    torch.save([torch.arange(10)], tmp_path / "file", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "file").read_bytes()
    for length in range(0, len(data), 41):
        (tmp_path / "file").write_bytes(data[:length])
        with pytest.raises(InputError, match="cut short"):
            read_torch(tmp_path / "file", "count file")
