"""`python scripts/run_notebook.py NOTEBOOK`: run it from the top and keep what it shows.

What libraries say on stderr (progress, warnings) is of this machine and is left out.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in its folder. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    how = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=how).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    at = Path(sys.argv[1])
    nbformat.write(run(at), at)
