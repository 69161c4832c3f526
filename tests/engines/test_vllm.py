"""What the vLLM plugin decides without vLLM; the rest is in tests/serving, with it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lapefast as lf
from lapefast.engines.vllm.engine import _joined
from lapefast.engines.vllm.runner import compile_factor
from lapefast.engines.vllm.served import served_here
from lapefast.errors import InputError
from lapefast.neurons import Layout, NeuronSet, save_edits


def edits(width: int = 8):
    layout = Layout(("a", "b"), {"a": width, "b": 6}, "0" * 64, "model")

    def some(a, b):
        return NeuronSet({"a": torch.tensor(a), "b": torch.tensor(b)}, layout=layout)

    return {
        "off": lf.deactivate(some([1, 2], [3])),
        "same": lf.deactivate(some([1, 2], [3])),
        "elsewhere": lf.deactivate(some([1], [2, 3])),
        "on": lf.activate(some([1, 2], [3]), 0.5),
    }


@pytest.fixture
def serve(tmp_path, monkeypatch):
    def serve(name="edits.json", server=None, width=8):
        save_edits(tmp_path / name, edits(width), server)
        monkeypatch.setenv("LAPEFAST_EDITS", str(tmp_path / name))
        return served_here()

    return serve


def test_the_plugin_without_an_edit_file_does_not_even_import(monkeypatch):
    monkeypatch.delenv("LAPEFAST_EDITS", raising=False)
    code = (
        "import sys; from lapefast.engines.vllm import register; register(); "
        "print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_request_names_its_set_or_none(serve):
    served = serve()
    assert served.set_of(None) == served.set_of({}) == served.set_of({"other": 1}) == -1
    assert served.set_of({"lapefast_edit": "none"}) == -1
    for number, name in enumerate(served.names):
        assert served.set_of({"lapefast_edit": name, "other": 1}) == number


def test_the_servers_edit_holds_unless_a_request_says_otherwise(serve):
    served = serve(server="on")
    assert served.set_of(None) == served.set_of({"other": 1}) == served.names.index("on")
    assert served.set_of({"lapefast_edit": "none"}) == -1
    assert served.set_of({"lapefast_edit": "off"}) == served.names.index("off")


@pytest.mark.parametrize("name", ["of", "", None, 0, ["on"]])
def test_a_name_that_the_file_does_not_have_is_an_error(serve, name):
    with pytest.raises(InputError, match="off, same, elsewhere, on.*or be 'none'"):
        serve().set_of({"lapefast_edit": name})


def test_a_misspelt_argument_is_an_error(serve):
    with pytest.raises(InputError, match="lapefast-edit means nothing; lapefast_edit"):
        serve().set_of({"lapefast-edit": "on"})


def test_edits_share_a_salt_where_they_do_the_same_and_nowhere_else(serve):
    served = serve()
    off, same, elsewhere, on = (served.salted(number, None) for number in range(4))
    assert off == same
    assert len({None, off, elsewhere, on}) == 4
    assert served.salted(-1, None) is None
    # No salt that an unedited request may bring is that of an edit.
    assert served.salted(-1, "own") not in ("own", served.salted(-1, "other"))
    assert served.salted(-1, off) not in (off, None)
    assert served.salted(0, "own") not in (off, "own", served.salted(0, "another"))


def test_a_file_that_was_written_anew_is_read_anew(serve):
    assert serve().server == -1
    assert serve(server="on").server == 3


def test_compiled_code_depends_on_the_sites_and_not_on_the_edits(serve):
    plain, with_server = serve(), serve("other.json", server="on")
    factor = compile_factor(plain.layout)
    assert factor == compile_factor(with_server.layout)
    assert factor != compile_factor(serve("wider.json", width=9).layout)
    assert lf.__version__ in factor


def test_ranks_are_joined_and_never_summed():
    def rank(start, *columns, flags=(0, 0)):
        return start, torch.tensor(flags), {"counts": torch.tensor([columns])}

    whole = [[1, 2, 3, 4]]
    # In whatever order they answer; the same neurons on both ranks stand there once.
    for ranks in (
        [rank(0, 1, 2), rank(2, 3, 4)],
        [rank(2, 3, 4), rank(0, 1, 2)],
        [rank(0, 1, 2, 3, 4), rank(0, 1, 2, 3, 4)],
    ):
        assert _joined("layers.0.mlp", ranks)["counts"].tolist() == whole
    broken = [rank(0, 1, 2), rank(2, 3, 4, flags=(5, 0))]
    with pytest.raises(InputError, match=r"layers\.0\.mlp: 5 activations are not finite"):
        _joined("layers.0.mlp", broken)
