"""``finetune --report-to``: what mlx-lm's callbacks are told, and a run that outlives a tracker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_support import document, invoke
from mlx_lm.tuner import callbacks
from typer.testing import Result

from abft_mlx import loading, recipe, tracking

SHORT = (
    "--set=training.updates=3",
    "--set=training.examples=16",
    "--set=training.prompts_per_update=8",
    "--set=data.validation_rows=8",
    "--set=training.validate_every=2",
    "--set=training.validation_prompts=8",
)


class Fake:
    """A tracker's module: what it is called with, and when it breaks."""

    def __init__(self, breaks_at: str | int | None = None) -> None:
        self.breaks_at = breaks_at
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[dict[str, Any]] = []

    def init(self, **given: Any) -> None:
        if self.breaks_at == "init":
            raise RuntimeError("\nno key; log in\nmore")
        self.started.append(given)

    def log(self, told: dict[str, Any], step: int) -> None:
        if self.breaks_at == step:
            raise ConnectionError("the cable is out")
        self.logged.append((step, told))

    def finish(self, **given: Any) -> None:
        if self.breaks_at == "finish":
            raise ConnectionError("the cable is out")
        self.finished.append(given)


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    fakes = {"wandb": Fake(), "swanlab": Fake()}
    for name, fake in fakes.items():
        monkeypatch.setattr(callbacks, name, fake)
    return fakes


def run(output: Path, *arguments: object) -> Result:
    return invoke("finetune", "demo", "--output", output, *SHORT, *arguments)


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_trackers_are_told_every_update(trackers: dict[str, Fake], tmp_path: Path) -> None:
    output = tmp_path / "first"
    result = run(output, "--report-to", "wandb, SwanLab", "--project-name", "mine", "--json")
    assert result.exit_code == 0, result.stderr
    assert document(result)["tracking"] == {
        "project": "mine", "trackers": ["wandb", "swanlab"], "lost": {}
    }  # fmt: skip
    written = metrics(output)
    assert len(written) == 3
    for fake in trackers.values():
        (started,) = fake.started
        assert started["project"] == "mine"
        assert started["config"] == tracking.config(recipe.load(output))
        assert started["config"]["training"]["shared_demonstrations"] == 8, "resolved"
        # mlx-lm reports a validation under the update that it followed.
        assert [step for step, _ in fake.logged] == [1, 2, 2, 3, 3]
        updates = [told for _, told in fake.logged if "train_loss" in told]
        own = ("seen_examples", "punish", "reward", "induction_heads", "A", "B", "tokens")
        for told, line in zip(updates, written, strict=True):
            assert told["iteration"] == line["step"]
            assert told["train_loss"] == line["loss"]
            assert told["tokens_per_second"] == line["tokens"] / line["seconds"]
            assert [told[name] for name in own] == [line[name] for name in own]
        validations = [told for _, told in fake.logged if "val_accuracy" in told]
        assert validations == [
            {"iteration": line["step"], "val_accuracy": line["validation_accuracy"]}
            for line in written
            if "validation_accuracy" in line
        ]
        assert fake.finished == [{}]
    assert trackers["wandb"].started[0]["name"] == "first"
    assert trackers["swanlab"].started[0]["experiment_name"] == "first"


def test_a_tracker_that_fails_does_not_lose_the_run(
    trackers: dict[str, Fake], tmp_path: Path
) -> None:
    trackers["wandb"].breaks_at = 2
    trackers["swanlab"].breaks_at = "finish"
    output = tmp_path / "run"
    result = run(output, "--report-to", "wandb,swanlab", "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert document(result)["tracking"]["lost"] == {
        "wandb": "update 2: the cable is out", "swanlab": "the end: the cable is out"
    }  # fmt: skip
    warning = "warning: wandb failed at update 2 (the cable is out) and gets nothing more"
    assert result.stderr.count(warning) == 1
    assert [step for step, _ in trackers["wandb"].logged] == [1]
    assert [step for step, _ in trackers["swanlab"].logged] == [1, 2, 2, 3, 3]
    assert trackers["wandb"].finished == []
    assert [one["step"] for one in metrics(output)] == [1, 2, 3]
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["finished"]
    assert (output / "adapters.safetensors").is_file()


def test_a_tracker_that_cannot_start_stops_the_run_before_it_begins(
    trackers: dict[str, Fake], tmp_path: Path
) -> None:
    trackers["swanlab"].breaks_at = "init"
    output = tmp_path / "run"
    result = run(output, "--report-to", "wandb,swanlab")
    assert result.exit_code == 1
    assert "error: swanlab cannot start (no key; log in); nothing was trained" in result.stderr
    assert not output.exists()
    assert trackers["wandb"].finished == [{"exit_code": 1}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--report-to", "wandb"), "--report-to wandb: wandb is not installed; pip install wandb"),
        (("--report-to", "wadnb"), "--report-to 'wadnb' is no tracker that mlx-lm knows; give "),
        (("--report-to", " , "), "--report-to ' , ' names no tracker; give wandb or swanlab"),
        (("--project-name", "mine"), "--project-name 'mine' is for --report-to, which is not"),
    ],
)
def test_what_cannot_be_reported_to_is_said_before_anything_is_opened(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(loading, "load_model", opened)
    monkeypatch.setattr(callbacks, "wandb", None)
    result = run(tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_no_path_of_this_machine_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    other = {"name": "data/other.csv", "data": {"source": str(tmp_path / "data" / "other.csv")}}
    made = recipe.default(
        [
            "model=models/mine",
            "data.source=~/secret/mails.csv",
            recipe.override("evaluation.transfer", [other]),
            "prompt.label_affix=/",
        ]
    )
    sent = tracking.config(made)
    assert sent["model"] == "mine"
    assert sent["data"]["source"] == "mails.csv"
    assert sent["evaluation"]["transfer"][0]["name"] == "other.csv"
    assert sent["evaluation"]["transfer"][0]["data"]["source"] == "other.csv"
    assert sent["prompt"]["label_affix"] == "/"
    assert str(tmp_path) not in json.dumps(sent)
    hub = recipe.default(["model=mlx-community/Qwen2.5-0.5B-Instruct-4bit", "data.source=SetFit/x"])
    assert tracking.config(hub) == hub.model_dump(mode="json")
    assert tracking.config(recipe.default(["model=."]))["model"] == tmp_path.name
