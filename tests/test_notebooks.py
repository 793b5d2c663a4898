"""The notebooks run from a fresh kernel, and define nothing: what they show is the library's."""

import ast
import os
from pathlib import Path

import pytest

from tests.environment import QUICK_COMPILATION

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
TIMEOUT = 1800  # seconds a cell
SHOWN = {  # pictures, a file left
    "quickstart": (2, "report.html"),
    "puzzle": (3, "child/arch.json"),
    "distillation": (2, "compare/table.md"),
}


def read(path: Path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    return nbformat.read(path, as_version=4)


@each
def test_a_notebook_defines_nothing_and_keeps_no_output(path):
    for cell in read(path).cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs and cell.execution_count is None
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, kinds)]


@pytest.mark.slow
@each
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = read(path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILATION)  # one device, as on the machine of a reader
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    shown = [output for cell in code for output in cell.outputs if "data" in output]
    pictures, left = SHOWN[path.stem]
    assert sum("<svg" in output["data"].get("text/html", "") for output in shown) == pictures
    assert list(tmp_path.glob(f"*/{path.stem}/{left}"))
