"""Running studies on the bundled model: killed, resumed, failing, in shards, changed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_support import report, text

from abft_mlx import adapters, experiment, loading, study
from abft_mlx.errors import AdapterError, RunError
from abft_mlx.study.running import plain

NAMES = [
    "demo--generated-emotion--untrained",
    "demo--generated-purpose--untrained",
    "demo--generated-emotion--abft--42",
    "demo--generated-purpose--abft--42",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that ran through."""
    folder = tmp_path_factory.mktemp("studies") / "whole"
    outcome = study.run(study.loads(text()), folder, report=report)
    assert (outcome.ran, outcome.done, outcome.failed, outcome.left) == (NAMES, NAMES, {}, [])
    assert outcome.reports == [folder / "table.csv"]
    return folder


MODELS = "models: [demo, {name: again, model: demo}]"


@contextmanager
def failing(wrong: Callable[[str], BaseException | None]) -> Iterator[None]:
    """Tasks for which ``wrong`` has an error cannot be opened."""
    whole = experiment.prepare

    def prepare(recipe: Any, **options: Any) -> Any:
        error = wrong(recipe.name)
        if error is not None:
            raise error
        return whole(recipe, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "prepare", prepare)
        yield


def test_a_cells_file(whole: Path) -> None:
    cells = {cell["id"]: cell for cell in study.read(whole)}
    assert sorted(cells) == sorted(NAMES)
    for cell in cells.values():
        assert {
            "schema", "id", "model", "task", "method", "seed", "sweep", "recipe", "status", "error",
            "run", "shift", "census", "evaluation", "seconds", "versions", "device",
            "load_average", "fingerprints",
        } <= cell.keys()  # fmt: skip
        assert (cell["schema"], cell["status"], cell["error"]) == (1, "done", None)
        method = cell["evaluation"]["methods"]["vanilla"]
        assert 0 <= method["accuracy"] <= 1
        assert len(method["right"]) == 8
        magnitude = np.array(cell["census"]["magnitude"])
        assert magnitude.shape == np.array(cell["census"]["correctness"]).shape
        assert cell["census"]["prompts"] == 8
    trained = cells[NAMES[2]]
    run = trained["run"]
    assert (run["updates"], len(run["curve"])) == (2, 2)
    assert set(run["curve"][0]) == {
        "step", "seen_examples", "loss", "punish", "reward", "induction_heads", "A", "seconds",
    }  # fmt: skip
    assert [one["seen_examples"] for one in run["curve"]] == [4, 8]
    for key in ("seconds", "peak_memory_bytes", "process_peak_bytes", "adapter_bytes"):
        assert run[key] > 0
    assert trained["recipe"]["training"]["seed"] == trained["seed"] == 42
    assert sum(trained["shift"]["q"]) > 0
    assert cells[NAMES[0]]["run"] is None
    assert cells[NAMES[0]]["shift"] is None
    assert cells[NAMES[0]]["seed"] is None


def test_a_trained_cell_is_what_finetune_and_eval_give(whole: Path, tmp_path: Path) -> None:
    (cell,) = (one for one in study.read(whole) if one["id"] == NAMES[2])
    (planned,) = (one for one in study.cells(study.loads(text())) if one.id == NAMES[2])
    run = experiment.finetune(planned.recipe, tmp_path / "run")
    document = experiment.evaluate(planned.recipe, run.output)
    assert document["methods"] == cell["evaluation"]["methods"]
    (base,) = (one for one in study.read(whole) if one["id"] == NAMES[0])
    assert document["base"]["methods"] == base["evaluation"]["methods"]
    metrics = [json.loads(one) for one in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [one["loss"] for one in metrics] == [one["loss"] for one in cell["run"]["curve"]]
    assert cell["run"]["adapter_bytes"] == run.adapter_bytes
    model = run.experiment.loaded.model
    assert cell["shift"] == plain(adapters.shift_norms(model))


def test_only_the_study_is_left_in_its_folder(whole: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["cells", "study.yaml", "table.csv"]
    again = study.load(whole)
    assert study.cells(again) == study.cells(study.loads(text()))


def test_a_complete_study_only_rewrites_its_reports(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "cells").iterdir()}
    table = (whole / "table.csv").read_bytes()
    (whole / "table.csv").unlink()
    with failing(lambda _: RuntimeError("no")):
        outcome = study.run(study.loads(text()), whole, report=report)
    assert outcome.ran == []
    assert (whole / "table.csv").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in (whole / "cells").iterdir()} == before


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from abft_mlx import runtime
runtime.prepare()
from abft_mlx import study
from study_support import report, text

class Kill(study.StudyEvents):
    updates = 0
    def update(self, update):
        self.updates += 1
        if self.updates == 3:
            os.kill(os.getpid(), signal.SIGKILL)

study.run(study.loads(text()), sys.argv[1], report=report, events=Kill())
"""


def test_killed_and_started_again_it_gives_the_same_table(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    program = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    held = sorted(path.name for path in (folder / "cells").iterdir())
    assert held == sorted(f"{name}.json" for name in NAMES[:3])
    assert [path.name for path in (folder / "running").iterdir()] == [NAMES[3]]
    assert not (folder / "table.csv").exists()
    before = {path: path.read_bytes() for path in (folder / "cells").iterdir()}
    outcome = study.run(study.loads(text()), folder, report=report)
    assert outcome.ran == NAMES[3:]
    assert (folder / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (folder / "running").exists()


def test_what_was_begun_or_failed_comes_last(tmp_path: Path) -> None:
    opened = study.loads(text("[vanilla]"))
    first, second = study.cells(opened)
    begun = study.Store(tmp_path / "begun")
    begun.scratch(first).mkdir(parents=True)
    begun.cells.mkdir()
    seen: list[str] = []
    with failing(lambda name: seen.append(name) or RunError("no")):
        study.run(opened, begun.path)
        assert seen == [second.task, first.task]
        seen.clear()
        (begun.cells / f"{second.id}.json").unlink()
        study.run(opened, begun.path)
    assert seen == [second.task, first.task]


ERRORS = [
    (RunError("the loss is not\nfinite"), "the loss is not finite"),
    (AdapterError("rank 3"), "rank 3"),
    (MemoryError(), "out of memory: the machine has no more"),
    (RuntimeError("[matmul] shapes"), "RuntimeError: [matmul] shapes"),
    (ValueError("x"), "ValueError: x"),
]


@pytest.mark.parametrize(("error", "line"), ERRORS)
def test_a_failed_cell_does_not_stop_the_rest(error: Exception, line: str, tmp_path: Path) -> None:
    opened = study.loads(text("[vanilla]"))
    with failing(lambda name: error if name == "generated/emotion" else None):
        outcome = study.run(opened, tmp_path / "s", report=report)
    assert outcome.ran == NAMES[:2]
    assert outcome.done == [NAMES[1]]
    assert outcome.failed == {NAMES[0]: line}
    assert outcome.left == []
    assert outcome.reports
    cell = study.read(tmp_path / "s")[0]
    assert (cell["status"], cell["error"], cell["run"]) == ("failed", line, None)
    assert cell["recipe"]["name"] == "generated/emotion"


def test_a_failed_cell_is_run_again_and_no_other(whole: Path, tmp_path: Path) -> None:
    opened, folder = study.loads(text("[vanilla]")), tmp_path / "s"
    with failing(lambda name: RunError("no") if "emo" in name else None):
        study.run(opened, folder)
    left_alone = study.run(opened, folder, retry_failed=False, report=report)
    assert (left_alone.ran, left_alone.failed) == ([], {NAMES[0]: "no"})
    assert left_alone.reports
    again = study.run(opened, folder)
    assert (again.ran, again.failed, len(again.done)) == ([NAMES[0]], {}, 2)
    cells = {cell["id"]: cell for cell in study.read(folder)}
    expected = {cell["id"]: cell for cell in study.read(whole)}
    assert cells[NAMES[0]]["evaluation"] == expected[NAMES[0]]["evaluation"]


def test_a_failed_cell_may_be_mended(tmp_path: Path) -> None:
    text_before = text("[vanilla]")
    with failing(lambda name: RunError("no") if "emotion" in name else None):
        study.run(study.loads(text_before), tmp_path / "s")
    mended = text_before.replace(
        "generated/emotion,", "{recipe: generated/emotion, settings: [evaluation.batch_tokens=9]},"
    )
    assert study.run(study.loads(mended), tmp_path / "s").failed == {}


def test_a_full_disk_stops_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RunError("no space")

    monkeypatch.setattr(study.Store, "write", full)
    seen: list[str] = []
    with (
        failing(lambda name: seen.append(name) or RunError("no")),
        pytest.raises(RunError, match="no space"),
    ):
        study.run(study.loads(text("[vanilla]")), tmp_path / "s")
    assert len(seen) == 1


def test_an_interruption_loses_the_running_cell_alone(tmp_path: Path) -> None:
    class Stop(study.StudyEvents):
        def update(self, update: Any) -> None:
            assert update.step == 1
            assert list((tmp_path / "s" / "running").iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(study.loads(text()), tmp_path / "s", events=Stop())
    assert [cell["id"] for cell in study.read(tmp_path / "s")] == NAMES[:2]
    assert not list((tmp_path / "s" / "running").iterdir())


def test_shards_together_are_the_study(whole: Path, tmp_path: Path) -> None:
    opened, folder = study.loads(text()), tmp_path / "s"
    outcomes = [study.run(opened, folder, part=(n, 3), report=report) for n in (3, 1, 2)]
    assert sorted(name for one in outcomes for name in one.ran) == sorted(NAMES)
    assert [bool(one.left) for one in outcomes] == [True, True, False]
    assert [bool(one.reports) for one in outcomes] == [False, False, True]
    assert (folder / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()


def test_a_shard_reports_its_own_failures_until_all_is_done(tmp_path: Path) -> None:
    opened, folder = (
        study.loads(text("[vanilla]").replace("models: [demo]", MODELS)),
        tmp_path / "s",
    )
    mine = [[c.id for c in study.shard(study.cells(opened), n, 3)] for n in (1, 2, 3)]
    first = dict.fromkeys(mine[0], "no")
    with failing(lambda _: RunError("no")):
        assert study.run(opened, folder, part=(1, 3)).failed == first
    assert study.run(opened, folder, part=(2, 3)).failed == {}
    last = study.run(opened, folder, part=(3, 3), report=report)
    assert (last.ran, last.failed, bool(last.reports)) == (mine[2], first, True)


def test_adapters_are_kept_if_asked(tmp_path: Path) -> None:
    plane = "{like: plane, axes: [abft, end_to_end_qk], factors: [1]}"
    opened = study.loads(text(f"[abft, {plane}]", "keep_adapters: true").replace(
        ", generated/purpose", ""))  # fmt: skip
    assert study.run(opened, tmp_path / "s").failed == {}
    kept = tmp_path / "s" / "adapters"
    names = {path.name for path in kept.iterdir()}
    assert names == {NAMES[2], "demo--generated-emotion--plane--42"}
    inner = {path.name for path in (kept / "demo--generated-emotion--plane--42").iterdir()}
    assert inner == {"abft", "end_to_end_qk"}
    files = {path.name for path in (kept / NAMES[2]).iterdir()}
    assert files == {"adapters.safetensors", "adapter_config.json"}
    model = loading.load_model("demo", adapter=kept / NAMES[2]).model
    cell = next(one for one in study.read(tmp_path / "s") if one["id"] == NAMES[2])
    for name in ("q", "k"):
        norms = adapters.shift_norms(model)[name]
        assert plain(norms) == pytest.approx(cell["shift"][name], rel=1e-5)


def test_what_is_not_finite_is_null() -> None:
    value = {"a": np.array([[1.0, math.nan]]), 3: (np.float32(2), math.inf), "b": [True, None]}
    assert plain(value) == {"a": [[1.0, None]], "3": [2.0, None], "b": [True, None]}


class Told(study.StudyEvents):
    """Writes down all that it hears."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def planned(self, left: int, held: int, total: int) -> None:
        self.lines.append(("planned", left, held, total))

    def begin(self, number: int, left: int, cell: study.Cell) -> None:
        self.lines.append(("begin", number, left, cell.id))

    def prepared(self, experiment: Any, trainable: int) -> None:
        self.lines.append(("prepared", experiment.recipe.training.updates, trainable > 0))

    def update(self, update: Any) -> None:
        self.lines.append(("update", update.step))

    def stage(self, what: str) -> None:
        self.lines.append(("stage", what))

    def progress(self, done: int, total: int) -> None:
        self.lines.append(("progress", done, total))

    def end(self, cell: study.Cell, document: dict[str, Any]) -> None:
        self.lines.append(("end", cell.id, document["status"]))


def test_progress_is_heard(tmp_path: Path) -> None:
    opened = study.loads(text("[abft]"))
    with failing(lambda _: RunError("no")):
        study.run(opened, tmp_path / "s", part=(1, 2))
    told = Told()
    with failing(lambda name: RunError("no") if "purpose" in name else None):
        study.run(opened, tmp_path / "s", events=told)
    emotion, purpose = (cell.id for cell in study.cells(opened))
    mine = told.lines.index(("begin", 2, 2, emotion)) if told.lines[1][3] == purpose else 1
    assert told.lines[0] == ("planned", 2, 0, 2)
    trained = [line for line in told.lines[mine:] if line[0] in ("prepared", "update", "end")]
    assert trained[:4] == [
        ("prepared", 2, True), ("update", 1), ("update", 2), ("end", emotion, "done"),
    ]  # fmt: skip
    measuring = told.lines.index(("stage", "measuring"))
    assert ("progress", 8, 8) in told.lines[measuring:]
    assert ("end", purpose, "failed") in told.lines
    told.lines.clear()
    with failing(lambda name: RunError("no") if "purpose" in name else None):
        study.run(opened, tmp_path / "s", events=told)
    assert told.lines[:2] == [("planned", 1, 1, 2), ("begin", 1, 1, purpose)]
