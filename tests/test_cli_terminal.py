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


def test_training_keeps_its_validations_and_last_update(tmp_path: Path) -> None:
    shown = run(
        "finetune", "demo", "--output", tmp_path / "run", "--set", "training.updates=4",
        "--set", "training.prompts_per_update=4", "--set", "training.examples=16",
        "--set", "data.validation_rows=40", "--set", "training.validate_every=2",
        "--set", "adapter.layers=auto",
    )  # fmt: skip
    assert shown.status == 0, shown.terminal
    kept = "\n".join(shown.screen)
    assert re.search(r"update 2: validation \d", kept)
    assert re.search(r"update 4/4  loss ", kept)
    assert "looking for layers with induction heads" in shown.text
    assert "validation" in shown.text
    assert "left" not in kept
    again = run("finetune", "--resume", tmp_path / "run")
    assert again.status == 0, again.terminal
    assert "looking at heads" in again.text
    assert "update 1/4" not in again.text
