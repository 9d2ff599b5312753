"""From labelled messages to labelled files on SmolLM2, typed into a shell as a user would."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

# Of no class more than one word of the training messages gives away.
NEW = [
    ("I never received the code that unlocks my profile.", "account"),
    ("The invoice lists a fee that nobody told us about.", "billing"),
    ("My parcel was left in the rain by the courier.", "delivery"),
    ("It would be lovely to have a dark mode for the calendar.", "feature request"),
    ("You took the money for my plan twice, please refund it.", "billing"),
    ("When will the package with the lamp arrive?", "delivery"),
    ("The login page says that my password has expired.", "account"),
    ("Please add a button that prints the whole list.", "feature request"),
]


def abft_mlx(folder: Path, *arguments: object) -> str:
    """Standard output of a command, started in a folder."""
    cli = Path(__file__).resolve().parents[2] / "cli.py"
    done = subprocess.run(
        [sys.executable, cli, *map(str, arguments)],
        cwd=folder,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(
    smollm2: Path, messages: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run folder and what finetune said; the training file is gone, and the folder was moved."""
    folder = tmp_path_factory.mktemp("training")
    shutil.copy(messages, folder / "messages.csv")
    printed = abft_mlx(
        folder, "finetune", "--model", smollm2, "--data", "messages.csv", "--output", "run",
        "--text-column", "message", "--label-column", "team", "--json",
        # The published 1e-4 does nothing in eight updates of so small a model. Calibration would
        # gain here what ABFT gains without it.
        "--set", "objective.kind=abft", "--set", "training.learning_rate=1e-3",
        "--set", "training.updates=8",
        "--set", "training.examples=96", "--set", "training.prompts_per_update=16",
        "--set", "training.validate_every=4", "--set", "training.validation_prompts=64",
        "--set", "training.census_prompts=0", "--set", "prediction.draws=1",
        "--set", "prediction.calibration_texts=0", "--set", "data.holdout=protocol",
        "--set", "data.training_rows=72", "--set", "data.validation_rows=64",
        "--set", "data.demonstration_rows=16", "--set", "data.test_rows=16",
    )  # fmt: skip
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"
    (folder / "run").rename(moved)
    shutil.rmtree(folder)
    return moved, json.loads(printed)


def test_abft_raises_validation_accuracy(run: tuple[Path, dict[str, Any]]) -> None:
    validation = run[1]["validation"]
    assert validation["best"] > validation["before"] + 0.02  # 52% to 61% where it was written
    lines = (run[0] / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert json.loads(lines[-1])["induction_heads"] > 1  # it did not push them below the filter


def test_predict_labels_a_csv(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with (tmp_path / "new.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "message"), *enumerate(text for text, _ in NEW)])
    abft_mlx(tmp_path, "predict", run[0], "new.csv", "--output", "labels.csv")
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "message", "label", "probability"]
    assert [(row["id"], row["message"]) for row in rows] == [
        (str(number), text) for number, (text, _) in enumerate(NEW)
    ]
    assert all(0.25 <= float(row["probability"]) <= 1 for row in rows)
    right = [row["label"] == label for row, (_, label) in zip(rows, NEW, strict=True)]
    assert sum(right) >= 4, rows  # a guess has 2
