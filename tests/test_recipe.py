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
from abft_mlx.recipe.sections import Section


def mistake(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.loads(text, overrides, where="my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_papers() -> None:
    values = recipe.default().model_dump()
    expected: dict[str, dict[str, Any]] = {
        "data": {"training_rows": 1024, "demonstration_rows": 4096, "test_rows": 512},
        "prompt": {"demonstrations": 4},
        "adapter": {"rank": 16},
        "objective": {"punish": 0.5, "reward": 1.0, "cp": 0.03, "ci": 0.005, "cd": 0.005},
        "training": {"examples": 512, "updates": 32, "prompts_per_update": 32},
        "evaluation": {"queries": 512, "repeats": 2},
    }
    for section, settings in expected.items():
        assert settings.items() <= values[section].items()


def test_resolve_fills_in_what_depends_on_other_settings() -> None:
    assert recipe.resolve(recipe.default()).training.learning_rate == 1e-4
    full = recipe.resolve(recipe.default(["adapter.kind=full", "adapter.layers=auto"]))
    assert (full.training.learning_rate, full.objective.layers) == (2e-5, "trained")
    chosen = recipe.default(["training.learning_rate=1e-5"])
    assert recipe.resolve(chosen).training.learning_rate == 1e-5
    chat = recipe.resolve(recipe.loads("data: [trec, sst2]", ["prompt.chat=true"]))
    assert all(task.prompt.chat for task in chat.mixture)


@pytest.mark.parametrize(
    ("settings", "processes", "shared"),
    [
        ([], 1, 8),
        ([], 8, 4),
        (["training.examples=24", "training.prompts_per_update=6"], 1, 6),
        (["objective.kind=read_out"], 1, 16),
        (["prompt.selection=nearest"], 1, 1),
        (["training.gradient_checkpointing=true"], 1, 1),
        (["training.shared_demonstrations=2"], 1, 2),
    ],
)
def test_how_many_prompts_share_demonstrations(
    settings: list[str], processes: int, shared: int
) -> None:
    shares = recipe.share(recipe.default(settings), processes)
    assert shares.training.shared_demonstrations == shared


def test_every_setting_is_documented_and_frozen() -> None:
    sections = [Recipe, TaskSection]
    sections += [type(value) for _, value in recipe.default() if isinstance(value, Section)]
    assert len(sections) == 10
    for model in sections:
        for field in model.model_fields.values():
            inner = field.annotation
            section = isinstance(inner, type) and issubclass(inner, BaseModel)
            assert section or field.description
    with pytest.raises(ValidationError, match="frozen"):
        recipe.default().training.updates = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=null", None),
        ("training.learning_rate=1e-5", 1e-5),
        ("training.updates=3", 3),
        ("adapter.layers=[0, 2]", [0, 2]),
        ("objective.pid=false", False),
        ("prompt.input_prefix=text: ", "text: "),
        ("prompt.instruction=a=b # c", "a=b # c"),
        ('prompt.label_affix="\\n\\n"', "\n\n"),
        ("prompt.label_words={no: bad, yes: good}", {"no": "bad", "yes": "good"}),
        ("data.labels=[0, no]", ["0", "no"]),
        ("data.source=C:\\x.csv", "C:\\x.csv"),
    ],
)
def test_overrides_reach_every_kind_of_setting(override: str, value: Any) -> None:
    setting: Any = recipe.default([override])
    for key in override.partition("=")[0].split("."):
        setting = getattr(setting, key)
    assert setting == value
    assert type(setting) is type(value)


def test_overrides_come_after_the_file_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("training:\n  updates: 1e1\n  seed: 7\nadapter:\n")
    read = recipe.load(path, ["training.updates=5", "training.updates=6"])
    assert (read.training.updates, read.training.seed, read.adapter.rank) == (6, 7, 16)
    words = recipe.default(["prompt.label_words.not spam=ham"]).prompt.label_words
    assert words == {"not spam": "ham"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainig: {}", ["unknown key trainig", "did you mean training?"]),
        ("training: {update: 3}", ["training.update (value 3)", "updates?"]),
        ("rank: 3", ["unknown key rank", "adapter.rank?"]),
        ("training: {updates: -1}", ["training.updates is -1", "greater than or equal to 0"]),
        ("training: {updates: true}", ["training.updates is True", "number"]),
        ("objective: {punish: .nan}", ["objective.punish is nan"]),
        ("adapter: {kind: qlora}", ["adapter.kind is 'qlora'", "'lora', 'full' or 'paper'"]),
        ("adapter: {layers: [1, 1]}", ["adapter.layers is [1, 1]"]),
        ("adapter: {layers: []}", ["adapter.layers is []"]),
        ("data: {labels: [a, a ]}", ["data.labels is ['a', 'a']", "twice"]),
        ("data: {labels: [true, false]}", ["data.labels is True", "quote it"]),
        ("prompt: {label_prefix: 'x: '}", ["prompt.label_prefix is 'x: '", "space"]),
        ("prompt: {label_words: 3}", ["prompt.label_words is 3", "letters"]),
        ("prompt: {demonstrations: 0}", ["prompt.demonstrations is 0"]),
        ("training: 3", ["training is 3", "map of settings"]),
        ("[1, 2]", ["map of sections", "[1, 2]"]),
        ("data:\n  text: a\n  text: b", ["my.yaml line 3", "'text' occurs twice"]),
        ("data: {text: a", ["my.yaml line 1"]),
        ("data: !!python/name:os.system {}", ["my.yaml line 1"]),
        ("\x00", ["not YAML"]),
        ("training: {updates: -1, sed: 1}", ["and 1 more", "training.sed", "seed?"]),
        ("training: {shared_demonstrations: 5}", ["does not divide examples 512"]),
        ("objective: {kind: read_out}\nprompt: {selection: nearest}", ["share demonstrations"]),
        ("training: {updates: 0}", ["training.updates 0 trains nothing"]),
    ],
)
def test_mistakes_name_file_key_value_and_the_way_out(text: str, parts: list[str]) -> None:
    message = mistake(text)
    assert message.startswith("my.yaml")
    assert all(part in message for part in parts), message


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
    for change in ("data.seed=7", "data.holdout=stratified"):
        with pytest.raises(RecipeError, match="mixture"):
            recipe.change(mixed, [change])
    assert recipe.change(mixed, ["data.seed=42"]).data.seed == 42
    other = recipe.loads("data: {source: mails.csv}\nmixture: [sst2]", ["data.seed=7"])
    assert other.data.seed == 7
    for overrides in (["data=[trec, sst2]", "data.seed=7"], ["data=[]"], ["mixture=[3]"]):
        with pytest.raises(RecipeError, match="task"):
            recipe.default(overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.updates", "--set 'training.updates': write section.key=value"),
        ("training.=3", "write section.key=value"),
        ("training.update=3", "--set: unknown key training.update (value 3); did you"),
        ("training.updates.more=3", "training.updates is {'more': 3}"),
        ("adapter.layers=[1", "--set adapter.layers: '[1' is not a YAML value; quote it"),
    ],
)
def test_mistakes_in_overrides(override: str, message: str) -> None:
    assert message in mistake("{}", override)


def test_saving_and_loading_gives_the_same_recipe(tmp_path: Path) -> None:
    saved = recipe.default(
        [
            "name=no",
            "training.learning_rate=1e-5",
            "data.labels=[no, yes, 'null', '1e3', 2024-01-01, 1:30, 08, 0x1, 1_0]",
            'prompt.label_affix="\\n"',
            "prompt.instruction=Straße: ☃ # 'x' ",
            "prompt.label_words={no: a, yes: b}",
        ]
    )
    recipe.save(saved, tmp_path / "recipe.yaml")
    assert recipe.load(tmp_path / "recipe.yaml") == recipe.load(tmp_path) == saved
    values = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert values.pop("schema") == 1
    assert Recipe.model_validate(values) == saved
    assert list(values) == list(Recipe.model_fields)
    with pytest.raises(OutputError, match="cannot be written"):
        recipe.save(saved, tmp_path / "none" / "recipe.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmeo", "did you mean demo?"),
        ("none.yaml", "none.yaml: no such file"),
        (".", "it has no recipe.yaml"),
        ("mails.csv", "--data mails.csv"),
        ("runs/none", "no such folder"),
    ],
)
def test_recipes_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(name)
    assert message in str(caught.value)


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(b"model: caf\xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        recipe.load(path)


def test_a_list_of_data_is_a_mixture_measured_on_its_first_task(tmp_path: Path) -> None:
    text = "data: [trec, {data: {source: mails.csv}, prompt: {input_prefix: 'm: '}}]"
    mixed, trec = recipe.loads(text), recipe.load("trec")
    assert [task.name for task in mixed.mixture] == ["trec", "mails.csv"]
    assert (mixed.data, mixed.prompt, mixed.variants) == (trec.data, trec.prompt, trec.variants)
    assert mixed.mixture[0] == recipe.task(trec).model_copy(update={"name": "trec"})
    assert mixed.mixture[1].prompt.input_prefix == "m: "
    own = recipe.loads("data: [trec, sst2]\nprompt: {input_prefix: 'ask: '}")
    assert own.prompt.input_prefix == "ask: "
    assert own.mixture[0].prompt.input_prefix == "question: "
    beside = recipe.loads(
        "data: {source: demo}\nmixture: [sst2]",
        ["evaluation.transfer=[sst2, generated/urgency]"],
    )
    assert (beside.data.source, beside.mixture[0].name) == ("demo", "sst2")
    assert beside.evaluation.transfer[1].data.source == "urgency"
    recipe.save(beside, tmp_path / "recipe.yaml")
    assert recipe.load(tmp_path / "recipe.yaml") == beside
    (tmp_path / "recipe.yaml").write_text("prompt: {input_prefix: 'x: '}", encoding="utf-8")
    with pytest.raises(RecipeError, match="names no data, so it is no task"):
        recipe.default({"mixture": [str(tmp_path / "recipe.yaml")]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluation: {transfer: [trek]}", "did you mean trec?"),
        ("mixture: [{data: {source: a.csv, colour: red}}]", "unknown key mixture.0.data.colour"),
        ("mixture: [{prompt: {demonstrations: 2}}]", "mixture.0.name"),
    ],
)
def test_mistakes_in_tasks(text: str, message: str) -> None:
    assert message in mistake(text)


@pytest.mark.parametrize("removed", ["gradient=local", "keep_hidden=false", "keep_hidden_bytes=5"])
def test_a_removed_setting_is_refused_and_its_default_read(removed: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown key training.{removed.partition('=')[0]}"):
        recipe.load("demo", [f"training.{removed}"])
    assert recipe.load("demo", ["training.gradient=exact"]) == recipe.load("demo")
