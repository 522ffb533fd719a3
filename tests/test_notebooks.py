"""The notebooks run from top to bottom, with warnings as errors, and draw their plots."""

import importlib.util
import os
from pathlib import Path

import pytest

import lucid_jax

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
IMAGES = {
    "02_jit_decode_loop.ipynb": 2,
    "03_memory.ipynb": 4,
    "04_beam_and_speculative.ipynb": 4,
}  # how many plots; the others draw none

# What the kernel's own packages warn about is not ours to fix.
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel|IPython|matplotlib_inline|tornado|zmq")
"""

missing = [name for name in ("nbclient", "ipykernel") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.notebooks,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    # Nor is what Jupyter's own packages warn about in this process.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:(jupyter_client|jupyter_core|nbclient|nbformat|tornado|zmq)"
    ),
    pytest.mark.filterwarnings("ignore:unclosed .*(zmq|event loop|socket):ResourceWarning"),
]


def test_the_plots_expected_are_of_notebooks_that_exist():
    assert set(IMAGES) <= {path.name for path in NOTEBOOKS.glob("*.ipynb")}


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    # The kernel works elsewhere, must import the package that is being tested, and computes with XLA as
    # users have it: what conftest.py asks for compiles fast and runs slowly.
    environment = os.environ | {
        "PYTHONPATH": str(Path(lucid_jax.__file__).parent.parent),
        "XLA_FLAGS": "",
    }
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(tmp_path), env=environment)

    assert not list(tmp_path.iterdir()), "a notebook should leave no files behind"
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == IMAGES.get(path.name, 0)
