"""The notebook runs from top to bottom, and shows what it says."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    directory = tmp_path_factory.mktemp("quickstart")
    resources = {"metadata": {"path": directory}}
    client = nbclient.NotebookClient(notebook, timeout=240, resources=resources)
    client.execute()
    return notebook, directory


def shown(notebook, source):
    """What the cell that has `source` in it shows: type -> text."""
    cell = next(one for one in notebook.cells if source in one.source)
    results = [one.data for one in cell.outputs if one.output_type == "execute_result"]
    assert results, source
    return results[-1]


def test_every_cell_runs(ran):
    notebook, directory = ran
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert (directory / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["profile = ", "neurons = ", "matrix = "])
def test_results_show_themselves_as_tables(ran, name):
    html = shown(ran[0], name)["text/html"]
    assert "<table" in html
    assert "ja" in html


def test_steering_changes_the_text(ran):
    texts = eval(shown(ran[0], "towards = ")["text/plain"])
    assert len(set(texts.values())) == 3


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
