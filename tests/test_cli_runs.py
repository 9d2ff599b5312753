"""Whole commands on a tiny model: finetune, its resumption, eval, demo and the Python API."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from cli_support import document, invoke
from mlx.utils import tree_flatten

from abft_mlx import recipe
from abft_mlx.cli import options
from abft_mlx.cli.finetune import Follow
from abft_mlx.events import Update

# Random weights have no induction heads, so every head counts; and few steps must show.
SMALL = [
    "--set=objective.filter=false",
    "--set=training.learning_rate=0.05",
    "--set=training.updates=3",
    "--set=training.examples=8",
    "--set=training.prompts_per_update=4",
    "--set=prompt.demonstrations=2",
    "--set=evaluation.queries=6",
]


def tiny_recipe(model: Path, texts: Path) -> list[str]:
    """The overrides that make the defaults a small run."""
    names = {"model": str(model), "data.source": str(texts), "prompt.label_words": "auto"}
    settings = [f"{key}={json.dumps(value)}" for key, value in names.items()]
    return [*settings, *(setting.removeprefix("--set=") for setting in SMALL)]


def test_finetune_and_eval_speak_to_people(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("finetune", "--model", model, "--data", texts, *SMALL)
    assert result.exit_code == 0, result.stderr
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("mail-20")
    for words in (
        f"model     {model}",
        "80 texts",
        "ham (40), not spam (40)",
        "parameters, LoRA of rank 16 on W_Q and W_K: 3 updates of 4 prompts",
        f"adapter in {folder}\n",
        "accuracy on ",
    ):
        assert words in result.stdout
    assert "update 3/3  loss " in result.stderr
    saved = recipe.load(folder)
    assert (saved.prompt.selection, saved.data.holdout) == ("balanced", "stratified")
    assert saved.training.updates == 3
    before = (folder / "adapters.safetensors").read_bytes()
    again = invoke("finetune", "--model", model, "--data", texts, "--output", folder, *SMALL)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert (folder / "adapters.safetensors").read_bytes() == before
    shown = invoke("eval", folder).stdout
    for words in ("with the adapter", "prompting", "bag of words", "always '", "recall", "next:"):
        assert words in shown
    protocol = invoke("eval", folder, "--protocol", "accuracy", "--set", "evaluation.repeats=1")
    lines = protocol.stdout.splitlines()
    assert "6 prompts with 2 demonstrations" in lines
    assert any(line.startswith("base model ") and line.count("%") == 6 for line in lines)
    assert any(line.startswith("with adapter ") for line in lines)
    assert sum(line.startswith("gold \\ predicted") for line in lines) == 2


def test_finetune_as_json(model: Path, texts: Path, tmp_path: Path) -> None:
    result = invoke(
        "finetune", "--model", model, "--data", texts, "--output", tmp_path / "run", "--seed", 5,
        "--set=data.validation_rows=8", "--set=training.validate_every=2", "--json", *SMALL,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found["output"] == str(tmp_path / "run")
    assert found["labels"] == found["label_words"] == ["ham", "not spam"]
    assert found["verdict"]["n"] == found["prompts"]
    assert found["updates"] == 3
    assert set(found["validation"]) == {"before", "after", "best", "best_update"}
    assert found["adapter_bytes"] == (tmp_path / "run/adapters.safetensors").stat().st_size
    assert recipe.load(tmp_path / "run").training.seed == 5
    assert "validation accuracy: " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "demo"], "--data is missing: without a recipe"),
        (["--resume", "r", "--set", "training.updates=9"], "--resume takes everything"),
        (["--model", "m", "--data", "d", "--labels", "a"], "--labels 'a' does not name two"),
        (["demo", "--data", "missing.csv"], "missing.csv"),
        (["demo", "--model", "./no/such/model"], "./no/such/model"),
        (["--resume", "no-run-here"], "no-run-here"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("finetune", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_interrupted_run_goes_on(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    arguments = ["--model", model, "--data", texts, *SMALL, "--set=training.checkpoint_every=1"]
    assert invoke("finetune", *arguments, "--output", whole).exit_code == 0

    def interrupt(_self: object, update: Update) -> None:
        if update.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Follow, "update", interrupt)
    stopped = invoke("finetune", *arguments, "--output", halves)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("error: interrupted\n")
    resume = f"abft-mlx finetune --resume {halves}"
    assert f"to go on: {resume}\n" in stopped.stdout

    monkeypatch.undo()
    resumed = invoke(*shlex.split(resume)[1:], "--json")
    assert document(resumed)["updates"] == 3, resumed.stderr
    adapters = [folder / "adapters.safetensors" for folder in (whole, halves)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_python_face(model: Path, texts: Path, tmp_path: Path) -> None:
    import abft_mlx

    tiny = recipe.default(tiny_recipe(model, texts))
    steps: list[int] = []
    done = abft_mlx.finetune(
        tiny, tmp_path / "run", on_update=lambda update: steps.append(update.step)
    )
    assert steps == [1, 2, 3]
    loaded, tokenizer = abft_mlx.load(str(model), adapter=done.output)
    assert tokenizer.encode("the film")
    assert any("lora_a" in name for name, _ in tree_flatten(loaded.parameters()))
    by_recipe = abft_mlx.evaluate(tiny, done.output)
    assert by_recipe == abft_mlx.evaluate(done.output / "recipe.yaml", done.output)
    with pytest.raises(TypeError, match="overrides belong to"):
        abft_mlx.evaluate(tiny, overrides=["model=demo"])


def test_demo_tells_before_and_after(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny(_name: str | None, changes: dict[str, object]) -> recipe.Recipe:
        return recipe.default({**recipe.parse_overrides(tiny_recipe(model, texts)), **changes})

    monkeypatch.setattr(options, "open_recipe", tiny)
    run = tmp_path / "run"
    spoken = invoke("demo", "--output", run, "--seed", 1)
    assert spoken.exit_code == 0, spoken.stderr
    lines = spoken.stdout.splitlines()
    assert any(line.startswith("  before  ") and line.endswith("%") for line in lines)
    assert any(line.startswith("  after   ") and line.endswith("n = 12") for line in lines)
    assert any(line.startswith("  strongest head   layer ") for line in lines)
    assert any("the head that changed most" in line for line in lines)
    assert f"next: abft-mlx eval {run}" in lines
    assert recipe.load(run).training.seed == 1
    refused = invoke("demo", "--output", run)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr

    as_json = invoke("demo", "--output", run, "--json", "--overwrite")
    assert "strongest head" in as_json.stderr
    assert "changed most" not in as_json.stderr
    found = document(as_json)
    assert set(found) == {
        "before", "after", "prompts", "seconds", "peak_memory_bytes", "adapter_bytes", "output",
    }  # fmt: skip
    evaluated = document(invoke("eval", run, "--json"))
    assert found["before"].items() <= evaluated["base"]["methods"]["vanilla"].items()
    assert found["after"].items() <= evaluated["methods"]["vanilla"].items()
