"""A file is told by what it holds, whatever else its bytes look like."""

from __future__ import annotations

import json

import pytest
import torch

from lapefast.cli.kinds import kind_of


@pytest.mark.parametrize("length", [0x80, 0x180, int.from_bytes(b"PK", "little")])
def test_safetensors_are_told_by_their_header_whatever_its_length(length, tmp_path):
    """The length comes first: of some files it reads as a pickle begins, or a zip."""
    path = tmp_path / "p.safetensors"
    header = json.dumps({"__metadata__": {"format": "lapefast profile"}}).encode()
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length))
    assert kind_of(path) == "lapefast profile"


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_is_a_published_file(zipped, tmp_path):
    path = tmp_path / "neurons.pth"
    torch.save([[torch.tensor([1, 2])]], path, _use_new_zipfile_serialization=zipped)
    assert kind_of(path) == "published"
