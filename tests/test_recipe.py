"""Recipes: defaults, overrides, saving, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from abft_mlx import recipe
from abft_mlx.errors import OutputError, RecipeError
from abft_mlx.recipe import Recipe, TaskSection


def mistake(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.loads(text, overrides, where="my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_papers() -> None:
    one = recipe.default()
    assert (one.model, one.data.source) == ("demo", "demo")
    assert (one.data.training_rows, one.data.demonstration_rows, one.data.test_rows) == (
        1024,
        4096,
        512,
    )
    assert (one.prompt.demonstrations, one.adapter.rank) == (4, 16)
    assert (one.objective.punish, one.objective.reward) == (0.5, 1.0)
    assert (one.objective.cp, one.objective.ci, one.objective.cd) == (0.03, 0.005, 0.005)
    training = one.training
    assert (training.examples, training.updates, training.prompts_per_update) == (512, 32, 32)
    assert (one.evaluation.queries, one.evaluation.repeats) == (512, 2)


def test_resolve_fills_in_the_learning_rate_of_the_kind() -> None:
    assert recipe.resolve(recipe.default()).training.learning_rate == 1e-4
    full = recipe.resolve(recipe.default(["adapter.kind=full"]))
    assert full.training.learning_rate == 2e-5
    chosen = recipe.default(["training.learning_rate=1e-5"])
    assert recipe.resolve(chosen).training.learning_rate == 1e-5


def test_every_setting_is_documented_and_frozen() -> None:
    def models(model: type[BaseModel]) -> list[type[BaseModel]]:
        inner = [field.annotation for field in model.model_fields.values()]
        return [model, *(m for m in inner if isinstance(m, type) and issubclass(m, BaseModel))]

    found = models(Recipe)
    assert len(found) == 9
    found.append(TaskSection)
    for model in found:
        assert all(field.description for field in model.model_fields.values())
        assert model.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.default().training.updates = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model=some/model", "model", "some/model"),
        ("name=null", "name", None),
        ("training.learning_rate=1e-5", "training.learning_rate", 1e-5),
        ("training.updates=3", "training.updates", 3),
        ("adapter.layers=[0, 2]", "adapter.layers", [0, 2]),
        ("adapter.layers=null", "adapter.layers", None),
        ("objective.pid=false", "objective.pid", False),
        ("prompt.label_prefix=label:", "prompt.label_prefix", "label:"),
        ("prompt.input_prefix=text: ", "prompt.input_prefix", "text: "),
        ("prompt.instruction=", "prompt.instruction", ""),
        ("prompt.instruction=a=b # c", "prompt.instruction", "a=b # c"),
        ('prompt.label_affix="\\n\\n"', "prompt.label_affix", "\n\n"),
        ("prompt.label_words=auto", "prompt.label_words", "auto"),
        (
            "prompt.label_words={no: bad, yes: good}",
            "prompt.label_words",
            {"no": "bad", "yes": "good"},
        ),
        ("prompt.label_words.not spam=ham", "prompt.label_words", {"not spam": "ham"}),
        ("data.labels=[no, yes]", "data.labels", ["no", "yes"]),
        ("data.labels=[0, 1]", "data.labels", ["0", "1"]),
        ("data.source=C:\\x.csv", "data.source", "C:\\x.csv"),
    ],
)
def test_overrides_reach_every_kind_of_setting(override: str, path: str, value: Any) -> None:
    found: Any = recipe.default([override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_overrides_come_after_the_file_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("training:\n  updates: 1e1\n  seed: 7\nadapter:\n")
    one = recipe.load(path, ["training.updates=5", "training.updates=6"])
    assert (one.training.updates, one.training.seed, one.adapter.rank) == (6, 7, 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainig: {}", "my.yaml: unknown key trainig (value {}); did you mean training?"),
        ("training: {update: 3}", "unknown key training.update (value 3); did you mean updates?"),
        ("training: {rank: 3}", "unknown key training.rank (value 3); did you mean adapter.rank?"),
        ("rank: 3", "unknown key rank (value 3); did you mean adapter.rank?"),
        ("zzz: 3", "unknown key zzz (value 3); known are name, description, model"),
        (
            "training: {updates: -1}",
            "training.updates is -1: input should be greater than or equal to 0",
        ),
        (
            "training: {updates: many}",
            "training.updates is 'many': input should be a valid integer",
        ),
        ("training: {updates: true}", "training.updates is True: a number is needed here"),
        ("objective: {punish: .nan}", "objective.punish is nan"),
        (
            "adapter: {kind: qlora}",
            "adapter.kind is 'qlora': input should be 'lora', 'full' or 'paper'",
        ),
        ("adapter: {layers: [1, 1]}", "adapter.layers is [1, 1]: layer numbers start at 0"),
        ("data: {labels: [a]}", "data.labels is ['a']: list should have at least 2 items"),
        ("data: {labels: [a, a ]}", "data.labels is ['a', 'a']: a class name occurs twice"),
        (
            "data: {labels: [true, false]}",
            "data.labels is True: input should be a valid string; YAML",
        ),
        ("prompt: {label_prefix: 'x: '}", "prompt.label_prefix is 'x: ': it ends in a space"),
        (
            "prompt: {label_words: 3}",
            "prompt.label_words is 3: a map from labels to words, letters",
        ),
        ("prompt: {demonstrations: 0}", "prompt.demonstrations is 0"),
        ("training: 3", "training is 3: a map of settings is needed"),
        ("[1, 2]", "my.yaml: a recipe is a map of sections, this is [1, 2]"),
        ("seed: 1\nseed: 2", "my.yaml line 2: key 'seed' occurs twice"),
        ("data:\n  text: a\n  text: b", "my.yaml line 3: key 'text' occurs twice"),
        ("data: {text: a", "my.yaml line 1: expected ',' or '}'"),
        ("data: !!python/name:os.system {}", "my.yaml line 1: could not determine a constructor"),
        ("\x00", "my.yaml: not YAML"),
        (
            "training: {updates: -1, sed: 1}",
            "(and 1 more: unknown key training.sed (value 1); did you mean seed?)",
        ),
    ],
)
def test_mistakes_name_file_key_value_and_the_closest_key(text: str, said: str) -> None:
    message = mistake(text)
    assert message.startswith("my.yaml")
    assert said in message


def test_overrides_are_merged_before_they_are_checked() -> None:
    # Neither fits with what the recipe has; both together do, in either order.
    first, second = "adapter.dropout=0", "training.gradient_checkpointing=true"
    wet = recipe.default(["adapter.dropout=0.5"])
    for order in ([first, second], [second, first]):
        assert recipe.change(wet, order).training.gradient_checkpointing
    with pytest.raises(RecipeError, match=r"adapter\.dropout"):
        recipe.change(wet, [second])


def test_the_split_of_a_mixture_is_not_changed_for_its_first_task_alone() -> None:
    mixed = recipe.loads("data: [trec, sst2]")
    for change in ("data.seed=7", "data.test_rows=100", "data.holdout=stratified"):
        with pytest.raises(RecipeError, match="mixture"):
            recipe.change(mixed, [change])
    assert recipe.change(mixed, ["data.seed=42"]).data.seed == 42
    other = recipe.loads("data: {source: mails.csv}\nmixture: [sst2]", ["data.seed=7"])
    assert other.data.seed == 7
    with pytest.raises(RecipeError, match="list of tasks"):
        recipe.default(["data=[trec, sst2]", "data.seed=7"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.updates", "--set 'training.updates': write section.key=value"),
        ("=3", "--set '=3': write section.key=value"),
        ("training.=3", "write section.key=value"),
        (
            "training.update=3",
            "--set: unknown key training.update (value 3); did you",
        ),
        ("training.updates=x", "--set: training.updates is 'x'"),
        ("training.updates.more=3", "training.updates is {'more': 3}"),
        ("adapter.layers=[1", "--set adapter.layers: '[1' is not a YAML value; quote it"),
    ],
)
def test_mistakes_in_overrides(override: str, said: str) -> None:
    assert said in mistake("{}", override)


def test_saving_and_loading_gives_the_same_recipe(tmp_path: Path) -> None:
    one = recipe.default(
        [
            "name=no",
            "training.learning_rate=1e-5",
            "data.labels=[no, yes, 'null', '1e3', 2024-01-01, 1:30, 08, 0x1, 1_0]",
            'prompt.label_affix="\\n"',
            "prompt.instruction=Straße: ☃ # 'x' ",
            "prompt.label_words={no: a, yes: b}",
            "adapter.layers=[0]",
        ]
    )
    recipe.save(one, tmp_path / "recipe.yaml")
    assert recipe.load(tmp_path / "recipe.yaml") == one
    assert recipe.load(tmp_path) == one
    values = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert values.pop("schema") == 1
    assert Recipe.model_validate(values) == one
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    for key in Recipe.model_fields:
        assert f"\n{key}:" in f"\n{recipe.dumps(one)}"


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        recipe.save(recipe.default(), tmp_path / "none" / "recipe.yaml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dmeo", "no recipe is called 'dmeo': did you mean demo? Shipped are demo, "),
        ("none.yaml", "none.yaml: no such file; `abft-mlx recipes list` names"),
        (".", "it has no recipe.yaml"),
    ],
)
def test_recipes_that_are_not_there(name: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(name)
    assert said in str(caught.value)
