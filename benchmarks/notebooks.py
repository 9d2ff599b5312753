"""Run the notebooks of the docs from top to bottom, and keep what they print and draw.

    python benchmarks/notebooks.py

runs every notebook of ``docs/notebooks`` in place, each in a fresh kernel and an empty folder, with
warnings as errors. With ``--output FOLDER`` the notebooks stay as they are and the executed ones go
there. What differs from run to run is left out: times, versions, ids.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CHECKOUT = Path(__file__).resolve().parent.parent
NOTEBOOKS = CHECKOUT / "docs" / "notebooks"
KERNEL = "python3"
CELL_SECONDS = 300
# Before the first cell: matplotlib may say that it makes a cache, which belongs in no output.
# Warnings are errors, but for those that the kernel itself has to answer for.
FIRST = """
import warnings, matplotlib.font_manager
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel")
del warnings, matplotlib
"""
KERNEL_ARGUMENTS = [f"--IPKernelApp.exec_lines={FIRST}", "--IPKernelApp.log_level=ERROR"]


def execute(path: Path) -> Any:
    """A notebook as it is after all its cells have run, tidied.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    found_first = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as settings, tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name=KERNEL,
            extra_arguments=KERNEL_ARGUMENTS,
            resources={"metadata": {"path": folder}},
            record_timing=False,
        )
        # This checkout before any installed package, and nobody's own settings of IPython.
        client.execute(env=os.environ | {"PYTHONPATH": found_first, "IPYTHONDIR": settings})
    return tidied(notebook)


def tidied(notebook: Any) -> Any:
    """The same without what differs between machines and runs."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """Outputs whose text is in one piece, however the kernel's clock has cut it."""
    kept: list[Any] = []
    for output in outputs:
        if "metadata" in output:
            output.metadata = {}
        stream = output.get("name")
        if stream and kept and kept[-1].get("name") == stream:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 where a cell failed."""
    parser = argparse.ArgumentParser(description="Run the notebooks of the docs.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of docs/notebooks if none")
    parser.add_argument("--output", type=Path, help="where executed notebooks go; in place if none")
    given = parser.parse_args(arguments)
    for path in given.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        print(f"running {path.name} …", file=sys.stderr)
        try:
            executed = execute(path)
        except CellExecutionError as error:
            print(f"error: {path.name}: {error}", file=sys.stderr)
            return 1
        nbformat.validate(executed)
        target = given.output / path.name if given.output else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(nbformat.writes(executed, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
