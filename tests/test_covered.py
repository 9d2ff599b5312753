"""benchmarks/covered.py, on reports that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def report(path: Path, *files: tuple[str, int, int, int, int]) -> Path:
    keys = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    made = {name: dict(zip(keys, counts, strict=True)) for name, *counts in files}
    totals = {key: sum(one[key] for one in made.values()) for key in keys}
    document = {"totals": totals, "files": {name: {"summary": one} for name, one in made.items()}}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("counts", "status"),
    [((100, 90, 20, 18), 0), ((100, 89, 20, 20), 1), ((100, 100, 20, 17), 1), ((10, 10, 0, 0), 0)],
)
def test_lines_and_branches_count_each_for_itself(
    checkout: Path, tmp_path: Path, counts: tuple[int, int, int, int], status: int
) -> None:
    made = report(tmp_path / "coverage.json", ("abft_mlx/ranks.py", *counts))
    command = [sys.executable, str(checkout / "benchmarks/covered.py"), str(made), "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert bool(done.stderr) == bool(status)


def test_rooms_are_added_up(checkout: Path, tmp_path: Path) -> None:
    made = report(
        tmp_path / "coverage.json",
        ("abft_mlx/trainer/loop.py", 30, 30, 4, 3),
        ("abft_mlx/trainer/plan.py", 10, 9, 0, 0),
        ("abft_mlx/files.py", 60, 60, 6, 6),
    )
    command = [sys.executable, str(checkout / "benchmarks/covered.py"), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[2:] == [
        "| files | 60 | 100.0% | 6 | 100.0% |",
        "| trainer | 40 | 97.5% | 4 | 75.0% |",
        "| all | 100 | 99.0% | 10 | 90.0% |",
    ]


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"files": {}}', "nothing", "other"])
def test_what_is_no_report_is_no_success(
    checkout: Path, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "coverage.json"
    if content == "nothing":
        report(path)
    elif content == "other":
        report(path, ("setup.py", 1, 1, 0, 0))
    elif content is not None:
        path.write_text(content, encoding="utf-8")
    command = [sys.executable, str(checkout / "benchmarks/covered.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}: no report of coverage.py (")
    assert done.stderr.count("\n") == 1
