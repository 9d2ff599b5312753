"""The whole line on the bundled model: recipe in, run folder and measured accuracy out."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from abft_mlx import data, experiment, loading, runtime
from abft_mlx import recipe as recipes
from abft_mlx.errors import OutputError

SMALL = (
    "training.examples=24",
    "training.updates=3",
    "training.prompts_per_update=8",
    "training.checkpoint_every=1",
    "evaluation.queries=24",
    "evaluation.repeats=1",
)


def small(*changes):
    return recipes.load("demo", [*SMALL, *changes])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return experiment.finetune(small(), folder)


def test_the_run_folder_holds_the_contract(run):
    names = {one.name for one in run.output.iterdir()}
    assert names == {
        "adapters.safetensors", "adapter_config.json", "recipe.yaml", "metrics.jsonl", "run.json",
        "checkpoint", "heads.npz", "demonstrations.jsonl",
    }  # fmt: skip
    facts = json.loads((run.output / "run.json").read_text())
    assert facts["finished"] is True
    assert facts["totals"]["updates"] == 3
    assert facts["totals"]["seen_examples"] == 24
    assert facts["model"]["fingerprint"].startswith("sha256:")
    assert facts["data"]["rows"]["test"] == 512
    assert {"mlx", "mlx-lm", "abft-mlx", "python"} <= facts["versions"].keys()
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert facts["totals"]["tokens"] == sum(line["tokens"] for line in lines)
    assert run.adapter_bytes == (run.output / "adapters.safetensors").stat().st_size


def test_only_the_prompts_that_are_used_are_built(monkeypatch, tmp_path):
    opened = experiment.prepare(small())
    built = []
    whole = type(opened.task.builder).build

    def build(self, *rest, **options):
        built.append(options.get("where", ""))
        return whole(self, *rest, **options)

    monkeypatch.setattr(type(opened.task.builder), "build", build)
    prompts = opened.test_prompts()
    assert prompts[3:5] == prompts[3:5]
    assert prompts[-1] is prompts[len(prompts) - 1]
    assert [where.split()[2] for where in built] == ["3", "4", "23"]
    with pytest.raises(IndexError):
        prompts[len(prompts)]
    built.clear()
    experiment.finetune(small("training.updates=1", "training.census_prompts=4"), tmp_path / "r")
    training = {where for where in built if where.startswith("training")}
    test = {where for where in built if where.startswith("evaluation")}
    assert (len(training), len(test)) == (8, 4)


def test_the_runs_own_recipe_reproduces_it_bit_for_bit(run, tmp_path):
    again = experiment.finetune(recipes.load(str(run.output / "recipe.yaml")), tmp_path / "again")
    for name in ("adapters.safetensors", "adapter_config.json", "recipe.yaml"):
        assert (again.output / name).read_bytes() == (run.output / name).read_bytes()


def test_probabilities_equal_the_whole_models_prompt_by_prompt(run):
    """Oracle: stock model, no padding, whole vocabulary, softmax over the label tokens alone."""
    ours = run.experiment
    stock, _ = mlx_lm.load(str(loading.find("demo")), adapter_path=str(run.output))
    chosen = ours.test_prompts()
    got = ours.measure(chosen)
    right, mass = 0, 0.0
    for prompt in chosen:
        logits = np.array(stock(mx.array([prompt.token_ids]))[0, -1], dtype=np.float64)
        few = logits[list(ours.task.space.first_ids)]
        probabilities = np.exp(few - few.max()) / np.exp(few - few.max()).sum()
        right += int(probabilities.argmax() == prompt.gold)
        mass += probabilities[prompt.gold]
    assert got["accuracy"] == right / len(chosen)
    assert got["true_label_probability"] == pytest.approx(mass / len(chosen), abs=1e-5)
    assert sum(map(sum, got["confusion"])) == len(chosen)


def test_evaluate_gives_the_contract_with_and_without_adapter(run):
    plain = experiment.evaluate(small())
    assert {"schema", "model", "adapter", "data", "k", "prompts", "methods"} <= plain.keys()
    assert (plain["schema"], plain["model"], plain["adapter"], plain["k"]) == (1, "demo", None, 4)
    assert "base" not in plain
    with_adapter = experiment.evaluate(small(), run.output)
    assert with_adapter["base"]["methods"] == plain["methods"]
    measured = run.experiment.measure(run.experiment.test_prompts())
    assert measured.items() <= with_adapter["methods"]["vanilla"].items()
    assert with_adapter["methods"] != plain["methods"]
    right, base = (
        np.array(list(one["methods"]["vanilla"]["right"])) == "1" for one in (with_adapter, plain)
    )
    (paired,) = with_adapter["comparisons"]
    assert (paired["first"], paired["second"]) == ("vanilla", "base.vanilla")
    assert paired["only_first"] == int((right & ~base).sum())
    assert paired["only_second"] == int((base & ~right).sum())
    json.dumps(with_adapter, allow_nan=False)


def test_resuming_with_another_recipe_or_version_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    experiment.finetune(small(), folder)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(
        recipe.replace("learning_rate: 0.001", "learning_rate: 0.1")
    )
    with pytest.raises(OutputError, match="another recipe, model, data or version"):
        experiment.finetune(None, folder)
    (folder / "recipe.yaml").write_text(recipe)
    versions = {**runtime.versions(), "mlx": "0.0.1"}
    monkeypatch.setattr(runtime, "versions", lambda: dict(versions))
    with pytest.raises(OutputError, match="another recipe, model, data or version"):
        experiment.finetune(None, folder)


def test_a_folder_in_use_is_refused_before_anything_is_opened(run):
    with pytest.raises(OutputError, match="--resume to continue it, --overwrite to replace it"):
        experiment.finetune(small("model=no-such/model"), run.output)
    with pytest.raises(OutputError, match="holds no run"):
        experiment.finetune(None, run.output.parent)


def test_validation_is_measured_and_recorded(tmp_path):
    recipe = small(
        "training.validate_every=2", "data.validation_rows=40", "training.validation_prompts=50"
    )
    result = experiment.finetune(recipe, tmp_path / "run")
    assert [step for step, _ in result.progress.validations] == [0, 2, 3]
    chosen = result.experiment.validation_prompts()
    assert len(chosen) == 50
    splits = result.experiment.task.splits
    rows = data.demonstration_rows(40, 2, len(splits.training), 4, recipe.training.seed)[41]
    shown = [splits.training.pairs()[row] for row in rows]
    assert chosen[41] == result.experiment.task.builder.build(shown, *splits.validation.pairs()[1])
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["validation"]
    assert facts["prompts"] == 50
    assert facts["before"] == result.progress.validations[0][1]
    kept = dict(result.progress.validations)[facts["kept_update"]]
    assert kept == facts["best"] == result.experiment.measure(chosen)["accuracy"]


def test_training_never_sees_test_or_demonstration_texts(run):
    splits = run.experiment.task.splits
    rows = [set(rows) for rows in splits.rows.values()]
    assert sum(map(len, rows)) == len(set().union(*rows))
    known = set(splits.training.texts)
    assert not known & set(splits.test.texts)
    assert not known & set(splits.demonstrations.texts)
