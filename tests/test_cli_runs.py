"""Whole commands on a tiny model: finetune, its resumption, eval and the run folder's words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from cli_support import document, invoke

from abft_mlx import recipe, trainer
from abft_mlx.cli import options

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
    given = [f"{key}={json.dumps(value)}" for key, value in names.items()]
    return [*given, *(one.removeprefix("--set=") for one in SMALL)]


@pytest.fixture(scope="module")
def run(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    result = invoke("finetune", "--model", model, "--data", texts, "--output", folder, *SMALL)
    assert result.exit_code == 0, result.stderr
    return folder


def test_finetune_without_a_recipe(model: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    result = invoke("finetune", "--model", model, "--data", texts, "--output", folder, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert f"model     {model}" in result.stdout
    assert "80 texts" in result.stdout
    assert "ham (40), not spam (40)" in result.stdout
    assert "parameters, LoRA of rank 16 on W_Q and W_K: 3 updates of 4 prompts" in result.stdout
    assert "update 3/3  loss " in result.stderr
    assert f"adapter in {folder}\n" in result.stdout
    assert (
        "accuracy on 20 test texts" in result.stdout or "accuracy on 6 test texts" in result.stdout
    )
    assert (folder / "adapters.safetensors").is_file()
    saved = recipe.load(str(folder / "recipe.yaml"))
    assert (saved.prompt.selection, saved.data.holdout) == ("balanced", "stratified")
    assert saved.training.updates == 3


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
    assert recipe.load(str(tmp_path / "run/recipe.yaml")).training.seed == 5
    assert "update 3/3" in result.stderr
    assert "validation accuracy: " in result.stderr


def test_finetune_names_its_folder_itself(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("finetune", "--model", model, "--data", texts, "--quiet", *SMALL)
    assert result.exit_code == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mail-20")
    assert f"adapter in runs/{folder.name}" in result.stdout
    assert result.stderr == ""
    assert "accuracy on " in result.stdout


def test_a_quiet_run_prints_warnings_about_the_data(model: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.csv"
    rows = [f"the {'good' if n % 2 else 'bad'} film {n // 4},{'ab'[n % 2]}" for n in range(40)]
    twice.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    words = ("--model", model, "--data", twice, "--output", tmp_path / "run", "--quiet")
    result = invoke("finetune", *words, *SMALL, "--set=training.updates=1")
    assert result.exit_code == 0, result.stderr
    assert "rows repeat an earlier text exactly" in result.stdout


def test_finetune_refuses_to_overwrite(model: Path, texts: Path, run: Path) -> None:
    before = (run / "adapters.safetensors").read_bytes()
    result = invoke("finetune", "--model", model, "--data", texts, "--output", run, *SMALL)
    assert result.exit_code == 2
    assert str(run) in result.stderr
    assert "--overwrite" in result.stderr
    assert (run / "adapters.safetensors").read_bytes() == before


def test_a_run_json_that_is_no_object_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]", encoding="utf-8")
    result = invoke("finetune", "--resume", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "run.json" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.csv"], "error: --model is missing: without a recipe"),
        (["--model", "demo"], "error: --data is missing: without a recipe"),
        (["--resume", "r", "--set", "training.updates=9"], "error: --resume takes everything"),
        (["--model", "m", "--data", "d", "--labels", "a"], "error: --labels 'a' does not name two"),
        (["nothing-of-this-name"], "error: no recipe is called 'nothing-of-this-name'"),
        (["demo", "--set", "training.udpates=9"], "updates"),
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


def test_a_file_with_problems_lists_them(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\n" + "hello,ham\n,spam\n,ham\n" * 5, encoding="utf-8")
    result = invoke("finetune", "--model", model, "--data", bad)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert "bad.csv" in lines[0]
    # Ten rows of the same kind are one line with a count.
    assert len(lines) == 1
    assert "9 more" in lines[0]


def test_interrupted_run_goes_on(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    arguments = ["--model", model, "--data", texts, *SMALL, "--set=training.checkpoint_every=1"]
    assert invoke("finetune", *arguments, "--output", whole).exit_code == 0

    one_update = trainer.Trainer._update

    def interrupt(self: trainer.Trainer) -> None:
        if self.progress.updates == 2:
            raise KeyboardInterrupt
        one_update(self)

    monkeypatch.setattr(trainer.Trainer, "_update", interrupt)
    stopped = invoke("finetune", *arguments, "--output", halves)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("error: interrupted\n")
    resume = f"abft-mlx finetune --resume {halves}"
    assert f"to go on: {resume}\n" in stopped.stdout

    monkeypatch.undo()
    resumed = invoke(*shlex.split(resume)[1:], "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert document(resumed)["updates"] == 3
    adapters = [folder / "adapters.safetensors" for folder in (whole, halves)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_eval_without_an_adapter(model: Path, texts: Path) -> None:
    result = invoke("eval", "--model", model, "--data", texts, *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found["schema"] == 1
    assert found["adapter"] is None
    assert (found["k"], found["prompts"]) == (2, 6)
    assert "base" not in found
    method = found["methods"]["classifier"]
    assert sum(map(sum, method["confusion"])) == 6
    for measure in ("accuracy", "macro_f1", "expected_calibration_error", "true_label_probability"):
        assert 0 <= method[measure] <= 1


def test_eval_of_a_run_uses_its_recipe(run: Path) -> None:
    result = invoke("eval", "--adapter", run, "--json")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found["adapter"] == str(run)
    assert found["prompts"] == 6
    assert found["labels"] == ["ham", "not spam"]
    assert set(found["base"]["methods"]) == set(found["methods"]) == {"classifier", "vanilla"}
    again = invoke("eval", "--adapter", run, "--json")
    assert again.stdout == result.stdout


def test_eval_speaks_to_people(run: Path) -> None:
    result = invoke("eval", run)
    assert result.exit_code == 0, result.stderr
    shown = result.stdout
    for words in ("with the adapter", "prompting", "bag of words", "always '", "recall", "next:"):
        assert words in shown
    protocol = invoke("eval", run, "--protocol", "accuracy", "--set", "evaluation.repeats=1")
    assert protocol.exit_code == 0, protocol.stderr
    lines = protocol.stdout.splitlines()
    assert "6 prompts with 2 demonstrations" in lines
    assert any(line.startswith("base model ") and line.count("%") == 6 for line in lines)
    assert any(line.startswith("with adapter ") for line in lines)
    assert sum(line.startswith("gold \\ predicted") for line in lines) == 2


def assert_picture(lines: list[str]) -> None:
    """See that the prompt and the map of heads come last, with the words that explain them."""
    begin = next(n for n, line in enumerate(lines) if "the head that changed most" in line)
    assert any("ham[✓" in line or "ham[✗" in line for line in lines[begin:])
    (heading,) = (n for n, line in enumerate(lines) if line.startswith("  layer before   after"))
    assert heading > begin
    assert [line.split()[0] for line in lines[heading + 1 : heading + 3]] == ["0", "1"]
    assert lines[heading + 3].startswith("  more on right labels: ░5%")
    assert not [line for line in lines[heading + 4 :] if line and "abft-mlx" not in line[:14]]


def test_eval_of_an_adapter_that_does_not_fit(run: Path, tmp_path: Path) -> None:
    wide = tmp_path / "broken"
    wide.mkdir()
    for name in ("recipe.yaml", "adapter_config.json"):
        (wide / name).write_bytes((run / name).read_bytes())
    (wide / "adapters.safetensors").write_bytes(b"not safetensors")
    result = invoke("eval", "--adapter", wide, "--json")
    assert result.exit_code == 2
    assert document(result)["error"]["kind"] == "AdapterError"
    assert "adapters.safetensors" in result.stderr


def test_python_face(model: Path, texts: Path, tmp_path: Path) -> None:
    import abft_mlx

    recipes = recipe.default(tiny_recipe(model, texts))
    steps: list[int] = []
    done = abft_mlx.finetune(
        recipes, tmp_path / "run", on_update=lambda update: steps.append(update.step)
    )
    assert steps == [1, 2, 3]
    loaded, tokenizer = abft_mlx.load(str(model), adapter=done.output)
    assert tokenizer.encode("the film")
    assert (
        any("lora_a" in name for name, _ in loaded.named_modules()) or loaded.trainable_parameters
    )
    by_recipe = abft_mlx.evaluate(recipes, done.output)
    assert by_recipe == abft_mlx.evaluate(done.output / "recipe.yaml", done.output)
    with pytest.raises(TypeError, match="overrides belong to"):
        abft_mlx.evaluate(recipes, overrides=["model=demo"])


def test_demo_tells_before_and_after(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def tiny(name: str | None, changes: dict[str, object]) -> recipe.Recipe:
        asked.append(name)
        return recipe.default({**recipe.parse_overrides(tiny_recipe(model, texts)), **changes})

    monkeypatch.setattr(options, "open_recipe", tiny)
    spoken = invoke("demo", "--output", tmp_path / "one", "--seed", 1)
    assert spoken.exit_code == 0, spoken.stderr
    assert asked == ["demo"]
    lines = spoken.stdout.splitlines()
    assert any(line.startswith("  before  ") and line.endswith("%") for line in lines)
    assert any(line.startswith("  after   ") and line.endswith("n = 12") for line in lines)
    strongest = next(n for n, line in enumerate(lines) if line.startswith("  strongest head   la"))
    assert_picture(lines[strongest:])
    assert sum(line.startswith("layers    all train") for line in lines) == 1
    assert f"next: abft-mlx eval {tmp_path}/one" in lines
    assert recipe.load(tmp_path / "one/recipe.yaml").training.seed == 1

    as_json = invoke("demo", "--output", tmp_path / "two", "--json")
    assert as_json.exit_code == 0, as_json.stderr
    assert "strongest head" in as_json.stderr
    assert "changed most" not in as_json.stderr
    found = document(as_json)
    assert set(found) == {
        "before", "after", "prompts", "seconds", "peak_memory_bytes", "adapter_bytes", "output",
    }  # fmt: skip
    evaluated = document(invoke("eval", "--adapter", tmp_path / "two", "--json"))
    for moment, methods in (
        ("before", evaluated["base"]["methods"]),
        ("after", evaluated["methods"]),
    ):
        assert found[moment].items() <= methods["vanilla"].items()

    quiet = invoke("demo", "--output", tmp_path / "three", "--quiet")
    assert quiet.stderr == ""
    assert "strongest head" in quiet.stdout
    assert "changed most" not in quiet.stdout

    refused = invoke("demo", "--output", tmp_path / "two")
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert "1/3" not in refused.stdout
