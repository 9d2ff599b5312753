"""What names on the command line mean, and what a mistyped one is told, without any network."""

from __future__ import annotations

import json
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


def test_eval_of_a_run_keeps_its_document_in_it(run: Path) -> None:
    shown = document(invoke("eval", run, "--json", "--quiet"))
    kept = run / "eval.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == shown
    kept.unlink()


def test_a_recipe_with_an_adapter_for_heads(run: Path) -> None:
    few = ("--prompts", 4, "--no-detectors", "--json", "--quiet")
    named = document(invoke("heads", run / "recipe.yaml", "--adapter", run, *few))
    assert named["states"] == document(invoke("heads", run, *few))["states"]


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
        ("eval", "demo", "--adapter", "here/nosuch"),
        ("eval", "demo", "--model", "here/nosuch"),
        ("eval", "demo", "--model", "nosuch"),
        ("predict", "runs/nosuch", "new.txt"),
        ("predict", "here/nosuch/"),
        ("heads", "here/nosuch", "--data", "demo"),
        ("heads", "here/nosuch"),
        ("finetune", "here/nosuch"),
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


def test_a_mistyped_data_file_is_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    refused(("eval", "demo", "--data", "data/nosuch"), "data/nosuch", "no such file")


@pytest.mark.parametrize("command", ["eval", "heads", "finetune"])
def test_a_data_file_is_no_recipe(command: str, texts: Path) -> None:
    refused((command, texts), f"--data {texts}")


def test_nor_for_recipes(texts: Path) -> None:
    result = invoke("recipes", "validate", texts)
    assert result.exit_code == 2
    assert f"--data {texts}" in result.stderr


@pytest.mark.parametrize(
    "words", [("eval",), ("eval", "--adapter"), ("predict",), ("heads",), ("finetune",)]
)
def test_a_folder_that_is_no_run_is_named_so(words: Sequence[str], tmp_path: Path) -> None:
    refused((*words, tmp_path), str(tmp_path), "no run")


def test_a_run_is_no_recipe_for_finetune(run: Path) -> None:
    refused(("finetune", run), f"--resume {run}", str(run / "recipe.yaml"))


def test_two_adapters_are_one_too_many(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(("eval", run, "--adapter", other), str(run), str(other))


def test_a_run_that_has_no_adapter_yet_is_told_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("model: demo\n", encoding="utf-8")
    for command in ("eval", "predict", "heads"):
        refused((command, tmp_path), f"--resume {tmp_path}")


def test_a_model_where_a_run_or_recipe_belongs(model: Path) -> None:
    refused(("eval", model), "--model")


def test_what_is_on_the_hub_is_named_by_an_option() -> None:
    refused(("eval", "owner/mails"), "--adapter", "--model")


def test_more_test_prompts_than_there_are(model: Path, texts: Path) -> None:
    result = invoke(
        "eval", "--model", model, "--data", texts, "--set", "evaluation.queries=5000",
        "--set", "evaluation.repeats=1", "--set", "prompt.demonstrations=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "5,000" in result.stdout


def test_push_without_a_token_sends_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = invoke("push", run, "me/x", "--base-model", "me/base")
    assert result.exit_code == 2
    assert "token" in result.stderr
    assert "sending" not in result.stdout
