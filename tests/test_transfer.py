"""Transfer: other tasks, with the sentences that training has seen left out and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_support import write_model

from abft_mlx import data, experiment, facts
from abft_mlx import recipe as recipes
from abft_mlx.data import LabelledTexts
from abft_mlx.errors import RecipeError
from abft_mlx.evaluation import label_probabilities
from abft_mlx.evaluation.transfer import seen_texts, transfer
from abft_mlx.recipe import EvaluationSection, TaskSection
from abft_mlx.task import Task, open_task

SECTION = EvaluationSection(queries=6, repeats=2, bootstrap_samples=50)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    from abft_mlx import loading

    return loading.load_model(str(write_model(tmp_path_factory.mktemp("models") / "tiny")))


def task(model, name: str, texts: list[str]) -> Task:
    section = TaskSection(
        name=name,
        data=recipes.DataSection(training_rows=6, demonstration_rows=8, test_rows=6),
        prompt=recipes.PromptSection(demonstrations=2),
    )
    labelled = LabelledTexts(
        tuple(texts), tuple(row % 2 for row in range(len(texts))), ("ham", "film"), name
    )
    return open_task(section, labelled, model.tokenizer, model.context_tokens)


@pytest.fixture(scope="module")
def tasks(model) -> tuple[Task, Task]:
    first = task(model, "first", [f"the good film {n}" for n in range(20)])
    second = task(model, "second", [f"a dull weather {n}" for n in range(20)])
    return first, second


def shared(first: Task, second: Task, query: int, demonstration: int) -> Task:
    """The second task, with one test query and one demonstration out of the first's training."""
    stolen = first.splits.training.texts
    test, shown = second.splits.test, second.splits.demonstrations
    test_texts, shown_texts = list(test.texts), list(shown.texts)
    test_texts[query] = stolen[0].upper() + " !"
    shown_texts[demonstration] = stolen[1]
    splits = replace(
        second.splits,
        test=replace(test, texts=tuple(test_texts)),
        demonstrations=replace(shown, texts=tuple(shown_texts)),
    )
    return replace(second, splits=splits)


def test_nothing_shared_is_the_whole_protocol(model, tasks) -> None:
    first, second = tasks
    found = transfer(model.model, [second], [first], SECTION)
    entry = found["tasks"]["second"]
    prompts = second.test_prompts(SECTION)
    want = label_probabilities(model.model, prompts, second.space, batch_tokens=512)
    right = want.argmax(1) == np.array([one.gold for one in prompts])
    assert (entry["prompts"], entry["shared_queries"], entry["shared_demonstrations"]) == (12, 0, 0)
    assert entry["right"] == "".join("01"[int(one)] for one in right)
    assert entry["accuracy"] == found["accuracy"] == pytest.approx(right.mean())
    low, high = entry["interval"]["accuracy"]
    assert low <= entry["accuracy"] <= high


def test_shared_queries_are_left_out_and_counted(model, tasks) -> None:
    first, second = tasks
    mixed = shared(first, second, query=2, demonstration=5)
    entry = transfer(model.model, [mixed], [first], SECTION)["tasks"]["second"]
    prompts = mixed.test_prompts(SECTION)
    kept = [i for i in range(12) if i % 6 != 2]
    rows = data.demonstration_rows(6, 2, 8, 2, 42)
    assert entry["prompts"] == 10
    assert entry["shared_queries"] == 1
    assert entry["shared_demonstrations"] == sum(5 in rows[i] for i in kept) > 0
    chosen = [prompts[i] for i in kept]
    want = label_probabilities(model.model, chosen, mixed.space, batch_tokens=512)
    right = want.argmax(1) == np.array([one.gold for one in chosen])
    assert entry["right"] == "".join("01"[int(one)] for one in right)


def test_a_task_that_is_all_seen_has_no_accuracy(model, tasks) -> None:
    first, second = tasks
    stolen = replace(second.splits.test, texts=first.splits.training.texts)
    known = replace(second, splits=replace(second.splits, test=stolen))
    entry = transfer(model.model, [known], [first], SECTION)
    assert entry["accuracy"] is None
    assert entry["tasks"]["second"] == {
        "prompts": 0, "shared_queries": 6, "shared_demonstrations": 0,
    }  # fmt: skip


def test_validation_texts_count_as_seen(tasks) -> None:
    first, _ = tasks
    with_validation = replace(
        first, splits=replace(first.splits, validation=first.splits.test.subset([0]))
    )
    more = seen_texts([with_validation]) - seen_texts([first])
    assert more == {data.fold(first.splits.test.texts[0])}


def test_the_recipe_must_name_other_tasks() -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.transfer is empty"):
        experiment.prepare(recipes.load("demo", ["evaluation.protocols=[transfer]"]))


def test_a_mixture_trains_on_its_tasks_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(
        "data: [demo, {data: {source: urgency}, prompt: {input_prefix: 'mail: '}}]\n"
        "training: {examples: 5, updates: 1, prompts_per_update: 4}\n"
    )
    opened = experiment.prepare(recipes.load(path))
    first, second = opened.mixture
    assert (opened.task.space.names, second.name) == (first.space.names, "urgency")
    prompts = opened.training_prompts()
    text = opened.loaded.tokenizer.decode
    starts = [text(list(one.token_ids)).partition(":")[0] for one in prompts]
    assert starts == ["message", "mail", "message", "mail", "message"]
    assert {one.target for one in prompts} <= {*first.space.token_ids, *second.space.token_ids}
    assert prompts[1] == second.training_prompts(opened.recipe.training)[0]


def test_a_checkpoint_belongs_to_all_texts_of_a_mixture(model, tasks) -> None:
    first, second = tasks
    recipe = recipes.resolve(recipes.default())
    made = {
        facts.digest(facts.made_with(recipe, model, some))
        for some in ([first], [second], [first, second], [second, first])
    }
    assert len(made) == 4
    assert facts.digest(facts.made_with(recipe, model, [first])) in made


def test_a_mixture_wants_one_number_of_demonstrations(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("data: [demo, {data: {source: urgency}, prompt: {demonstrations: 2}}]\n")
    with pytest.raises(RecipeError, match="urgency has 2 demonstrations, the recipe 4"):
        experiment.prepare(recipes.load(path))
