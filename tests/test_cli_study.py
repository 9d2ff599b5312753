"""The study command: its table and document, shards, lists, failures, Ctrl-C and wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_support import document, invoke
from study_support import text

from abft_mlx import experiment
from abft_mlx import study as studies
from abft_mlx.cli import study
from abft_mlx.errors import UsageError

UNTRAINED = ["demo--generated-emotion--untrained", "demo--generated-purpose--untrained"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A study of two cells that do not train."""
    path = tmp_path / "small.yaml"
    path.write_text(text("[vanilla]"), encoding="utf-8")
    return path


def test_a_study_for_a_person(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text().replace(", generated/purpose", ""), encoding="utf-8")
    folder = tmp_path / "out"
    result = invoke("study", path, "--output", folder)
    assert result.exit_code == 0, result.stderr
    errors = result.stderr.splitlines()
    assert errors[0] == "2 cells: 2 to run now, 0 done before or left to other shards"
    assert errors[1] == "cell 1/2  demo--generated-emotion--untrained"
    assert errors[2].startswith("  done in ")
    assert "accuracy " in errors[2]
    assert errors[3].startswith("cell 2/2  demo--generated-emotion--abft--42  about ")
    assert errors[4].startswith("update 1/2  loss ")
    assert errors[5].startswith("update 2/2  loss ")
    assert errors[6].startswith("  done in ")
    assert len(errors) == 7
    assert (folder / "table.md").read_text().strip() in result.stdout
    assert f"wrote {folder / 'table.csv'}\n" in result.stdout
    table = (folder / "table.csv").read_bytes()
    again = invoke("study", path, "--output", folder, "--quiet")
    assert (again.exit_code, again.stderr) == (0, "")
    assert "wrote" not in again.stdout
    assert (folder / "table.md").read_text().strip() in again.stdout
    assert (folder / "table.csv").read_bytes() == table


def test_a_study_as_json(small: Path, tmp_path: Path) -> None:
    result = invoke("study", small, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found.pop("seconds") > 0
    reports = found.pop("reports")
    assert str(tmp_path / "out" / "table.md") in reports
    assert found == {
        "schema": 1, "study": "small", "output": str(tmp_path / "out"), "shard": [1, 1],
        "cells": 2, "ran": UNTRAINED, "done": 2, "failed": [], "left": 0,
    }  # fmt: skip
    assert "cell 2/2" in result.stderr


def test_the_list_runs_nothing(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = invoke("study", small, "--output", folder, "--list")
    assert result.exit_code == 0, result.stderr
    assert f"2 cells, 0 of them done in {folder}" in result.stdout
    assert not folder.exists()
    parts = [
        document(invoke("study", small, "--list", "--json", "--shard", f"{n}/2"))["cells"]
        for n in (1, 2)
    ]
    assert [len(one) for one in parts] == [1, 1]
    assert sorted(one[0]["id"] for one in parts) == UNTRAINED
    assert parts[0][0]["status"] == "left"
    first = invoke("study", small, "--output", folder, "--shard", "1/2")
    assert "1 of 2 cells are left to other shards" in first.stdout
    assert not (folder / "table.md").exists()
    found = document(invoke("study", small, "--output", folder, "--list", "--json"))["cells"]
    assert {one["id"]: one["status"] for one in found} == {
        parts[0][0]["id"]: "done",
        parts[1][0]["id"]: "left",
    }
    last = document(invoke("study", small, "--output", folder, "--shard", "2/2", "--json"))
    assert (last["shard"], last["done"], len(last["ran"])) == ([2, 2], 2, 1)
    assert (folder / "table.md").exists()
    # A changed study is one line.
    small.write_text(text("[vanilla]").replace("queries=8", "queries=9"), encoding="utf-8")
    result = invoke("study", small, "--output", folder)
    assert result.exit_code == 2
    assert "evaluation.queries 8, and the study now has 9" in result.stderr


def test_failed_cells_come_after_the_table(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    missing = f"{{recipe: generated/purpose, settings: [data.source={tmp_path}/none.csv]}}"
    path.write_text(text("[vanilla]").replace("generated/purpose", missing), encoding="utf-8")
    for _ in range(2):  # it fails again
        result = invoke("study", path, "--output", tmp_path / "out")
        assert result.exit_code == 1
        lines = result.stderr.splitlines()
        assert lines[-2].startswith("failed: demo--generated-purpose--untrained: ")
        assert "none.csv" in lines[-2]
        assert lines[-1] == "error: 1 of 2 cells failed; the same command runs them again"
        assert "| demo | vanilla |" in result.stdout
    quiet = invoke("study", path, "--output", tmp_path / "out", "--quiet", "--no-retry-failed")
    assert quiet.stderr.splitlines() == lines[-2:]
    as_json = invoke("study", path, "--output", tmp_path / "out", "--json")
    assert as_json.exit_code == 1
    found = document(as_json)
    assert (found["ran"], found["done"]) == ([UNTRAINED[1]], 1)
    assert found["failed"][0]["id"] == UNTRAINED[1]
    listed = document(invoke("study", path, "--output", tmp_path / "out", "--list", "--json"))
    assert listed["cells"][1]["status"] == "failed"
    assert "none.csv" in listed["cells"][1]["error"]


def test_ctrl_c_says_how_to_go_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = experiment.Experiment.measure_all

    def stop(self: experiment.Experiment, events: Any) -> object:
        if "purpose" in self.task.name:
            raise KeyboardInterrupt
        return measured(self, events)

    monkeypatch.setattr(experiment.Experiment, "measure_all", stop)
    folder = tmp_path / "my out"
    stopped = invoke("study", small, "--output", folder)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("error: interrupted\n")
    assert f"to go on: abft-mlx study {small} --output '{folder}'\n" in stopped.stdout
    assert [cell["id"] for cell in studies.read(folder)] == UNTRAINED[:1]
    monkeypatch.undo()
    result = invoke("study", small, "--output", folder, "--json")
    assert document(result)["ran"] == UNTRAINED[1:]


WRONG = [
    (["{figure}"], "study figure: no figure is called pie; there are accuracy,"),
    (["no-such-study"], "no study is called 'no-such-study'"),
    (["{small}", "--shard", "3/2"], "--shard '3/2': write I/N"),
    (["{small}", "--shard", "half"], "--shard 'half': write I/N"),
    (["{small}", "--output", "{small}"], "small.yaml: is a file"),
    (["{small}", "--output", "{folder}"], "holds files and no study"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_usage_is_one_line(words: list[str], message: str, small: Path) -> None:
    named = {"small": small, "folder": small.parent}
    named["figure"] = small.with_name("figure.yaml")
    named["figure"].write_text(text("[vanilla]", "figures: [pie]", "figure"), encoding="utf-8")
    given = [word.format(**named) for word in words]
    result = invoke("study", *given, "--json")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert message in document(result)["error"]["message"]


def test_under_mlx_launch_the_rank_is_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        def rank(self) -> int:
            return 2

        def size(self) -> int:
            return 3

    assert study._part(None) == (1, 1)
    assert study._part((2, 5)) == (2, 5)
    monkeypatch.setattr("mlx.core.distributed.init", Group)
    assert study._part(None) == (3, 3)
    with pytest.raises(UsageError, match=r"mlx\.launch runs 3 processes"):
        study._part((1, 2))


@pytest.mark.slow
def test_mlx_launch_runs_every_cell_once(small: Path, tmp_path: Path, checkout: Path) -> None:
    words = ["--output", str(tmp_path / "out"), "--json"]
    launch = [Path(sys.executable).parent / "mlx.launch", "-n", "2", "--backend", "ring", "--"]
    done = subprocess.run(
        [*launch, sys.executable, checkout / "cli.py", "study", small, *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = [json.loads(line) for line in lines]
    assert sorted(one["shard"] for one in found) == [[1, 2], [2, 2]], done.stderr
    assert sorted(name for one in found for name in one["ran"]) == UNTRAINED
    assert (tmp_path / "out" / "table.md").exists()
