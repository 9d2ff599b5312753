"""The notebooks of the docs run from top to bottom, and print what is stored in them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?")
# What is trained ends slightly different on another machine; what is counted does not.
NEAR, NEAR_SHARE = 0.05, 0.02


def outputs(path: Path) -> list[tuple[str, str]]:
    """Kind and text of each output of a notebook; of a picture only that it is one."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    every: list[tuple[str, str]] = []
    for output in [output for cell in cells for output in cell.get("outputs", ())]:
        data: dict[str, Any] = output.get("data", {})
        text = "" if "image/png" in data else output.get("text", data.get("text/plain", ""))
        every.append((output["output_type"], "".join(text)))
    return every


def same(got: str, want: str) -> bool:
    """Whether two texts are equal, apart from spaces and the last digits of broken numbers."""
    if NUMBER.sub("#", got).split() != NUMBER.sub("#", want).split():
        return False
    return all(
        one == other
        or ("." in one + other and float(one) == pytest.approx(float(other), NEAR_SHARE, NEAR))
        for one, other in zip(NUMBER.findall(got), NUMBER.findall(want), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_prints_what_is_stored(name: str, checkout: Path, tmp_path: Path) -> None:
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package)
    nowhere = "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, checkout / "tools/notebooks.py", NOTEBOOKS / name, "--output", tmp_path],
        env=os.environ | {"http_proxy": nowhere, "https_proxy": nowhere},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stored = outputs(NOTEBOOKS / name)
    assert stored
    for (kind, got), (stored_kind, want) in zip(outputs(tmp_path / name), stored, strict=True):
        assert kind == stored_kind
        assert same(got, want), f"{got}\nis not what is stored:\n{want}\nrun make notebooks"
