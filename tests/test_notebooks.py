"""The notebooks of the docs run from top to bottom, and say what is stored in them."""

from __future__ import annotations

import base64
import getpass
import json
import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MISSING = [name for name in ("nbclient", "ipykernel", "matplotlib") if find_spec(name) is None]
NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?")
# What is trained ends a little elsewhere on another machine; what is counted does not.
NEAR, NEAR_SHARE = 0.05, 0.02
TELLTALE = re.compile(
    r"(?<![\w.])/(?:home|Users|root|tmp|var|work|private|opt)\b|[A-Z]:\\|site-packages|\.venv"
    r"|\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b|0x[0-9a-f]{6,}"
)

runs = pytest.mark.skipif(
    bool(MISSING), reason=f"notebooks are run with {', '.join(MISSING)}: pip install --group dev"
)


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path) if cell["cell_type"] == "code"]


def execute(checkout: Path, notebook: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """As ``make notebooks`` does, into another folder and with a proxy that is not there."""
    nowhere = "http://127.0.0.1:9"
    script = str(checkout / "benchmarks" / "notebooks.py")
    return subprocess.run(
        [sys.executable, script, str(notebook), "--output", str(output)],
        env=os.environ | {"http_proxy": nowhere, "https_proxy": nowhere},
        capture_output=True,
        text=True,
        check=False,
    )


def said(outputs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Kind and text of each output; of a picture only that it is one."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            found.append(("picture", ""))
        else:
            text = output.get("text", data.get("text/plain", ""))
            found.append((output.get("name", output["output_type"]), "".join(text)))
    return found


def pictures(cells: list[dict[str, Any]]) -> list[bytes]:
    """The PNG files that cells hold."""
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    found = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    return [base64.b64decode("".join(one)) for one in found]


def telling(text: str) -> list[str]:
    """What in a text tells of the machine that it was made on, or of the time."""
    user, host = re.escape(getpass.getuser()), re.escape(socket.gethostname())
    return TELLTALE.findall(text) + re.findall(rf"[/\\]{user}\b|\b{user}@|@{host}\b", text)


def differ(got: str, want: str) -> bool:
    """Whether two texts differ, apart from spaces and the last digits of broken numbers."""
    if NUMBER.sub("#", got).split() != NUMBER.sub("#", want).split():
        return True
    for one, other in zip(NUMBER.findall(got), NUMBER.findall(want), strict=True):
        near = NEAR + NEAR_SHARE * abs(float(other))
        if one != other and ("." not in one + other or abs(float(one) - float(other)) > near):
            return True
    return False


@runs
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_says_what_is_stored(name: str, checkout: Path, tmp_path: Path) -> None:
    done = execute(checkout, NOTEBOOKS / name, tmp_path)
    assert done.returncode == 0, done.stderr
    executed, stored = code_cells(tmp_path / name), code_cells(NOTEBOOKS / name)
    for cell, kept in zip(executed, stored, strict=True):
        where = f"{kept['id']} of {name}: run make notebooks\n"
        got, want = said(cell["outputs"]), said(kept["outputs"])
        assert [kind for kind, _ in got] == [kind for kind, _ in want], where
        for (_, new), (_, old) in zip(got, want, strict=True):
            assert not differ(new, old), f"{where}{new}\nis not what is stored:\n{old}"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_whole(name: str) -> None:
    cells = code_cells(NOTEBOOKS / name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = [kind for kind, _ in said(cell["outputs"])]
        assert set(kinds) <= {"stdout", "picture", "execute_result"}
        assert ("plt.show()" in "".join(cell["source"])) == ("picture" in kinds)
        if re.search(r"^print\(", "".join(cell["source"]), flags=re.MULTILINE):
            assert "stdout" in kinds
    assert any(kind == "picture" for cell in cells for kind, _ in said(cell["outputs"]))
    for picture in pictures(cells):
        assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_tells_of_no_machine(name: str) -> None:
    cells = read(NOTEBOOKS / name)
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    text = "\n".join(text for _, text in said(outputs))
    told = "\n".join("".join(cell["source"]) for cell in cells)
    assert not telling(f"{told}\n{text}")
    for picture in pictures(cells):
        assert b"tIME" not in picture
        assert not telling("".join(re.findall(r"tEXt[ -~\0]*", picture.decode("latin-1"))))
    assert all(cell["metadata"] == {} for cell in cells)
    assert all(output.get("metadata", {}) == {} for output in outputs)


def test_there_are_notebooks_and_the_index_names_them(checkout: Path) -> None:
    index = (checkout / "docs" / "index.md").read_text(encoding="utf-8")
    assert len(NAMES) >= 3
    for name in NAMES:
        assert f"(notebooks/{name})" in index
        assert f"\nnotebooks/{name.removesuffix('.ipynb')}\n" in index


@runs
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import warnings\nwarnings.warn('old', DeprecationWarning)", "DeprecationWarning: old"),
        ("warnings", "NameError"),
    ],
)
def test_a_cell_that_fails_or_warns_stops_it(
    source: str, message: str, checkout: Path, tmp_path: Path
) -> None:
    cell: dict[str, Any] = {"cell_type": "code", "id": "one", "execution_count": None}
    cell |= {"source": source, "metadata": {}, "outputs": []}
    page = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    notebook = tmp_path / "wrong.ipynb"
    notebook.write_text(json.dumps(page), encoding="utf-8")
    done = execute(checkout, notebook, tmp_path / "output")
    assert done.returncode == 1
    assert message in re.sub(r"\x1b\[[\d;]*m", "", done.stderr)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("got", "want", "different"),
    [
        ("layer 1  0.43", "layer 1 0.45", False),
        ("layer 1  0.43", "layer 2  0.43", True),
        ("layer 1  0.43", "layer 1  0.53", True),
        ("head  +0.00", "head  -0.00", False),
        ("64 prompts", "63 prompts", True),
        ("64 prompts", "64 texts", True),
        ("one", "one 1.0", True),
    ],
)
def test_the_comparison_sees_what_it_should(got: str, want: str, different: bool) -> None:
    assert differ(got, want) is different


@pytest.mark.parametrize(
    "text",
    [
        "'/tmp/x'",
        "/root/.venv/lib",
        "C:\\Users\\x",
        "2026-11-27",
        "at 10:11:12",
        "<Model at 0x7f3eb5c0>",
    ],
)
def test_what_tells_of_a_machine_is_seen(text: str) -> None:
    assert telling(text)
    assert not telling("runs/notebook, layer 0.1, heads/prompts 3/4, (1, 2, 73)")
