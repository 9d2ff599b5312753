"""What names on the command line mean, and what a mistyped one is told, without any network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_support import document, invoke, train_run

from abft_mlx import hub

SMALL = ("--set", "evaluation.queries=6", "--set", "evaluation.repeats=1", "--json", "--quiet")


@pytest.fixture(scope="module")
def run(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs") / "first", model, texts)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: str, *_rest: object, **_options: object) -> Path:
        pytest.fail(f"the hub was asked for {name}")

    monkeypatch.setattr(hub, "snapshot", asked)


def refused(words: Sequence[object], *parts: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    said = result.stderr.splitlines()[-1]
    assert said.startswith("error: "), result.stderr
    for part in parts:
        assert part in said


def test_a_run_means_the_model_with_its_adapter_for_eval(run: Path) -> None:
    named = document(invoke("eval", run, *SMALL))
    assert named == document(invoke("eval", "--adapter", run, *SMALL))
    assert named["adapter"] == str(run)
    assert "base" in named
    # A classifier's demonstrations are chosen for the model as it is; the protocol's are the same.
    protocol = ("--set=evaluation.demonstrations=per_query", *SMALL)
    named = document(invoke("eval", run, *protocol))
    recipe = document(invoke("eval", run / "recipe.yaml", *protocol))
    assert recipe["adapter"] is None
    assert recipe["methods"] == named["base"]["methods"]
    assert recipe["methods"] != named["methods"]


def test_a_shipped_recipe_is_no_model(run: Path) -> None:
    # Its data are on the hub, which nobody may ask: it is the data that are missing, not a model.
    result = invoke("heads", "generated/emotion", "--adapter", run)
    assert "emotion" not in result.stderr
    assert result.exit_code == 2  # the adapter is of another model
    assert "does not fit" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "runs/nosuch"),
        ("eval", "--adapter", "runs/nosuch"),
        ("eval", "demo", "--model", "nosuch"),
        ("eval", "demo", "--data", "here/nosuch"),
        ("predict", "runs/nosuch", "new.txt"),
        ("heads", "here/nosuch", "--data", "demo"),
        ("finetune", "~/nosuch"),
        ("export", "here/nosuch", "--to", "mlx", "--output", "out"),
        ("plot", "here/nosuch"),
        ("report", "here/nosuch"),
        ("push", "here/nosuch", "me/x"),
    ],
)
def test_a_mistyped_folder_is_no_such_folder(
    words: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "new.txt").write_text("a text\n", encoding="utf-8")
    refused(words, "no such", "nosuch")


def test_a_name_of_another_kind_is_told_the_way_out(
    run: Path, model: Path, texts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for command in ("eval", "predict", "heads", "finetune"):
        refused((command, tmp_path), str(tmp_path), "no run")
    refused(("eval", texts), f"--data {texts}")
    refused(("finetune", run), f"--resume {run}", str(run / "recipe.yaml"))
    refused(("eval", model), "--model")
    refused(("eval", "owner/mails"), "--adapter", "--model")
    (other / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(("eval", run, "--adapter", other), str(run), str(other))


def test_a_run_that_has_no_adapter_yet_is_told_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("model: demo\n", encoding="utf-8")
    for command in ("eval", "predict", "heads"):
        refused((command, tmp_path), f"--resume {tmp_path}")
