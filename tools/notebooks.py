"""Run the notebooks of docs/notebooks, each in a fresh kernel and an empty folder.

Warnings are errors. Times, versions and ids, which differ from run to run, are left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CHECKOUT = Path(__file__).resolve().parent.parent
# matplotlib may say that it makes a cache; the kernel answers for its own warnings.
FIRST = """
import warnings, matplotlib.font_manager
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel")
del warnings, matplotlib
"""


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook after all its cells have run; CellExecutionError where one fails."""
    notebook = nbformat.read(path, as_version=4)
    python_path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as settings, tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            extra_arguments=[f"--IPKernelApp.exec_lines={FIRST}", "--IPKernelApp.log_level=ERROR"],
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute(env=os.environ | {"PYTHONPATH": python_path, "IPYTHONDIR": settings})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"cell-{number}", {}
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = {}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of docs/notebooks if none")
    parser.add_argument("--output", type=Path, help="folder for the executed notebooks")
    chosen = parser.parse_args()
    for path in chosen.notebooks or sorted((CHECKOUT / "docs" / "notebooks").glob("*.ipynb")):
        notebook = execute(path)
        nbformat.write(notebook, chosen.output / path.name if chosen.output else path)


if __name__ == "__main__":
    main()
