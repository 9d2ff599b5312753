"""Whole commands on a pseudo-terminal: live lines while they work, none of it left at the end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from study_support import text

pytest.importorskip("pty", reason="needs pseudo-terminals, which Windows has not")

from terminal import run

SMALL = (
    "--set", "evaluation.queries=10",
    "--set", "evaluation.repeats=1",
    "--set", "evaluation.calibration_prompts=6",
    "--set", "evaluation.bootstrap_samples=20",
)  # fmt: skip


@pytest.mark.parametrize("columns", [40])
def test_a_study_shows_the_cell_and_its_updates(tmp_path: Path, columns: int) -> None:
    path = tmp_path / "mine.yaml"
    one_task = text().replace(", generated/purpose", "")
    path.write_text(one_task.replace("updates=2", "updates=30"), encoding="utf-8")
    shown = run("study", path, "--output", tmp_path / "out", columns=columns)
    assert shown.status == 0, shown.terminal
    frames = shown.text.split("cell 2/2")
    assert len(frames) > 2
    # The line below the cell's, in the same frame, is that of its updates.
    below = [line for frame in frames[1:] for line in frame.split("\n")[1:2]]
    assert any("update " in line for line in below), below
    assert any("opening model" in line for line in below)
    kept = "\n".join(shown.screen)
    assert "2 cells: 2 to run now" in kept
    assert "update 30/30  loss " in kept.replace("\n", "")
    assert len(re.findall("done in", kept)) == 2
    assert not [line for line in shown.screen if line.startswith("cell ")]
