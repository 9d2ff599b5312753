"""How flags become fields of a recipe, and how runs get their folder's name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from abft_mlx import api, recipe
from abft_mlx.cli import options
from abft_mlx.errors import UsageError


def opened(**flags: object) -> recipe.Recipe:
    return options.open_recipe(None, options.overrides(**flags))  # type: ignore[arg-type]


def test_every_flag_reaches_its_field() -> None:
    found = opened(
        model="m", data="d.csv", text_column="body", label_column="kind", labels="a, b,c",
        label_words="a = bug, b=not bug", learning_rate=2e-4, updates=7, demonstrations="6",
        training_seed=3, evaluation_seed=4,
    )  # fmt: skip
    assert (found.model, found.data.source) == ("m", "d.csv")
    assert (found.data.text, found.data.label) == ("body", "kind")
    assert found.data.labels == ["a", "b", "c"]
    assert found.prompt.label_words == {"a": "bug", "b": "not bug"}
    assert (found.training.learning_rate, found.training.updates) == (2e-4, 7)
    assert (found.training.seed, found.evaluation.seed) == (3, 4)
    assert found.prompt.demonstrations == 6
    assert opened(label_words="letters").prompt.label_words == "letters"
    # --set has the last word.
    assert opened(training_seed=3, settings=["training.seed=9"]).training.seed == 9


def test_without_a_recipe_the_one_for_own_texts_is_the_base() -> None:
    own = recipe.load("your-data")
    assert opened().model_copy(update={"name": own.name, "description": own.description}) == own
    # Its settings begin with name, which a message about another must not blame.
    with pytest.raises(UsageError, match="--set: unknown key foo"):
        opened(settings=["foo=1"])


@pytest.mark.parametrize("name", ["no", "007", "a: b #c", 'q"u\\o.csv', "données 😀", "{x}"])
def test_values_are_taken_as_they_stand(name: str) -> None:
    found = opened(data=name, labels=f"{name},other")
    assert found.data.source == name
    assert found.data.labels == [name, "other"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"label_words": "a=b,,c=d"}, "label=word"),
        ({"label_words": "bug="}, "label=word"),
        ({"labels": "one"}, "two classes or more"),
        ({"labels": "a,,b"}, "two classes or more"),
    ],
)
def test_lists_that_cannot_be_read(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options.overrides(**flags)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["name=my run!"], "my-run"),
        (["data.source=/tmp/some mails.csv"], "some-mails"),
        (["data.source='...'"], "run"),
    ],
)
def test_run_folders_are_named_by_recipe_or_data_and_time(
    overrides: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _format: "20261124-131500")
    folder = api.default_output(recipe.default(overrides))
    assert folder == Path("runs") / f"{name}-20261124-131500"
