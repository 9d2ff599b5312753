"""Tasks in a recipe: named by other recipes, written out, mixed, and kept when saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from abft_mlx import recipe
from abft_mlx.errors import RecipeError


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_list_of_data_is_a_mixture_measured_on_its_first_task() -> None:
    one = recipe.loads("data: [trec, {data: {source: mails.csv}, prompt: {input_prefix: 'm: '}}]")
    trec = recipe.load("trec")
    assert [task.name for task in one.mixture] == ["trec", "mails.csv"]
    assert (one.data, one.prompt, one.variants) == (trec.data, trec.prompt, trec.variants)
    assert one.mixture[0] == recipe.task(trec).model_copy(update={"name": "trec"})
    assert one.mixture[1].data.source == "mails.csv"
    assert one.mixture[1].prompt.input_prefix == "m: "


def test_what_the_recipe_says_itself_has_the_last_word() -> None:
    one = recipe.loads("data: [trec, sst2]\nprompt: {input_prefix: 'ask: '}")
    assert one.prompt.input_prefix == "ask: "
    assert one.mixture[0].prompt.input_prefix == "question: "


def test_a_mixture_beside_data_leaves_what_is_measured() -> None:
    one = recipe.loads("data: {source: demo}\nmixture: [sst2]")
    assert one.data.source == "demo"
    assert [task.name for task in one.mixture] == ["sst2"]


def test_overrides_name_tasks_too() -> None:
    one = recipe.load("demo", ["evaluation.transfer=[sst2, generated/urgency]"])
    assert [task.name for task in one.evaluation.transfer] == ["sst2", "generated/urgency"]
    assert one.evaluation.transfer[1].data.source == "urgency"


def test_saved_recipes_hold_the_tasks_themselves(tmp_path: Path) -> None:
    one = recipe.loads("data: [trec, sst2]\nevaluation: {transfer: [generated/emotion]}")
    recipe.save(one, tmp_path / "recipe.yaml")
    assert recipe.load(tmp_path / "recipe.yaml") == one


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: []", "my.yaml: data is an empty list; name at least one task"),
        ("data: [7]", "my.yaml: data has 7; name a recipe, or give a map of a task"),
        ("mixture: [[trec]]", "my.yaml: mixture has ['trec']; name a recipe"),
        ("evaluation: {transfer: [trek]}", "no recipe is called 'trek': did you mean trec?"),
        ("mixture: [{data: {source: a.csv, colour: red}}]", "unknown key mixture.0.data.colour"),
        ("mixture: [{prompt: {demonstrations: 2}}]", "mixture.0.name"),
    ],
)
def test_mistakes_are_one_line(text: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.loads(text, where="my.yaml")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "prompt: {input_prefix: 'x: '}", "data: {}"])
def test_a_recipe_that_names_no_data_is_no_task(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match="names no data, so it is no task"):
        recipe.load("demo", [f"evaluation.transfer=['{path}']"])
