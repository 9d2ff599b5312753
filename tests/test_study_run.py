"""Running studies on the bundled model: killed, resumed, failing, in shards, between weights."""

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
from abft_mlx.errors import RunError
from abft_mlx.study.running import best_factor, check_splits, plain

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
    assert sorted(path.name for path in folder.iterdir()) == ["cells", "study.yaml", "table.csv"]
    # A complete study only rewrites its reports.
    (folder / "table.csv").unlink()
    with failing(lambda _: RuntimeError("no")):
        assert study.run(study.load(folder), folder, report=report).ran == []
    assert (folder / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()


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


def test_a_failed_cell_does_not_stop_the_rest(tmp_path: Path) -> None:
    opened = study.loads(text("[vanilla]").replace("models: [demo]", MODELS))
    errors = iter([RunError("the loss is not\nfinite"), RuntimeError("[matmul] shapes")])
    with failing(lambda name: next(errors) if name == "generated/emotion" else None):
        outcome = study.run(opened, tmp_path / "s", report=report)
    again = NAMES[0].replace("demo", "again")
    assert outcome.failed == {
        NAMES[0]: "the loss is not finite", again: "RuntimeError: [matmul] shapes",
    }  # fmt: skip
    assert (len(outcome.ran), len(outcome.done), outcome.left) == (4, 2, [])
    assert outcome.reports
    cells = {cell["id"]: cell for cell in study.read(tmp_path / "s")}
    cell = cells[NAMES[0]]
    assert (cell["status"], cell["run"]) == ("failed", None)
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


FEW = "training.learning_rate=0.05, objective.filter=false, training.validation_prompts=8"


def one_task(methods: str, more: str = "") -> study.Study:
    return study.loads(
        text(methods, more)
        .replace(", generated/purpose", "")
        .replace("settings: [", f"settings: [{FEW}, ")
    )


def done(opened: study.Study, folder: Path) -> dict[str, dict[str, Any]]:
    outcome = study.run(opened, folder)
    assert outcome.failed == {}
    return {cell["method"]: cell for cell in study.read(folder)}


def test_a_planes_corners_are_base_and_methods(tmp_path: Path) -> None:
    plane = "{like: plane, axes: [abft, end_to_end], factors: [0, 1]}"
    cells = done(one_task(f"[vanilla, abft, end_to_end, {plane}]"), tmp_path / "s")
    found = cells["plane"]["plane"]
    assert (found["axes"], found["factors"]) == (["abft", "end_to_end"], [0.0, 1.0])
    assert found["prompts"] == 8
    corners = {"untrained": (0, 0), "abft": (1, 0), "end_to_end": (0, 1)}
    measured = {}
    for name, (row, column) in corners.items():
        method = cells[name]["evaluation"]["methods"]["vanilla"]
        for measure in ("accuracy", "macro_f1", "true_label_probability"):
            assert found[measure][row][column] == pytest.approx(method[measure], abs=1e-5)
        assert found["right"][row][column] == method["right"]
        measured[name] = method["true_label_probability"]
    assert len({round(value, 4) for value in measured.values()}) == 3
    assert cells["plane"]["run"] is None
    assert cells["plane"]["factors"] == [0.0, 1.0]
    for name in ("abft", "end_to_end"):
        ours, alone = found["runs"][name], cells[name]["run"]
        assert [one["loss"] for one in ours["curve"]] == [one["loss"] for one in alone["curve"]]
        assert cells["plane"]["axes"][name] == cells[name]["recipe"]


def test_an_extrapolation_is_chosen_on_validation(tmp_path: Path) -> None:
    far = "{name: far, like: extrapolate, factors: [0, 1, 2]}"
    rows = "{name: rows, like: abft, settings: [data.training_rows=768, data.validation_rows=256]}"
    cells = done(one_task(f"[vanilla, {rows}, {far}]"), tmp_path / "s")
    cell, found = cells["far"], cells["far"]["extrapolation"]
    assert found["factors"] == [0.0, 1.0, 2.0]
    assert (found["validation"]["prompts"], found["test"]["prompts"]) == (8, 8)
    best = max(found["validation"]["accuracy"])
    assert found["validation"]["accuracy"][found["factors"].index(found["chosen"])] == best
    for factor, method in {
        0: cells["untrained"]["evaluation"],
        1: cells["rows"]["evaluation"],
        found["chosen"]: cell["evaluation"],
    }.items():
        position = found["factors"].index(factor)
        for measure in ("accuracy", "true_label_probability"):
            expected = method["methods"]["vanilla"][measure]
            assert found["test"][measure][position] == pytest.approx(expected, abs=1e-5)
    assert (
        found["unscaled"]["methods"]["vanilla"]["right"]
        == (cells["rows"]["evaluation"]["methods"]["vanilla"]["right"])
    )
    assert len(set(found["test"]["true_label_probability"])) == 3
    norms = [sum(cells[name]["shift"]["q"]) for name in ("rows", "far")]
    assert norms[1] == pytest.approx(found["chosen"] * norms[0], rel=1e-4)


def test_the_factor_nearest_to_one_wins_a_tie() -> None:
    factors = [0.0, 0.5, 1.25, 2.0]
    assert best_factor(factors, [0.7, 0.8, 0.8, 0.8]) == 1.25
    assert best_factor(factors, [0.7, 0.8, 0.8, 0.9]) == 2.0
    assert best_factor(factors, [0.9, 0.8, 0.8, 0.9]) == 0.0


def test_a_set_too_small_to_carve_is_an_error() -> None:
    few = ["data.training_rows=3001", "data.demonstration_rows=100", "data.test_rows=3000"]
    (cell,) = study.cells(
        study.loads(
            "models: [demo]\ntasks: [demo]\nmethods: [extrapolate]\n"
            f"settings: [{', '.join(few)}, training.examples=4]"
        )
    )
    with pytest.raises(RunError, match="too few rows") as caught:
        check_splits(experiment.prepare(cell.recipe))
    assert "6000" in str(caught.value)


def test_a_mixture_trains_on_the_other_tasks(tmp_path: Path) -> None:
    opened = study.loads(text("[abft, abft_mixture]", "protocols: [accuracy, transfer]"))
    outcome = study.run(opened, tmp_path / "s")
    assert outcome.failed == {}
    cells = {(cell["task"], cell["method"]): cell for cell in study.read(tmp_path / "s")}
    for task, other in (
        ("generated/emotion", "generated/purpose"),
        ("generated/purpose", "generated/emotion"),
    ):
        mixed, alone = cells[task, "abft_mixture"], cells[other, "abft"]
        assert [one["loss"] for one in mixed["run"]["curve"]] == [
            one["loss"] for one in alone["run"]["curve"]
        ]
        assert list(mixed["evaluation"]["transfer"])
        assert other in str(mixed["evaluation"]["transfer"])
