"""How flags become fields of a recipe, and how runs get their folder's name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cli_support import invoke

from abft_mlx import api, recipe
from abft_mlx.cli import options
from abft_mlx.errors import UsageError


def opened(**flags: object) -> recipe.Recipe:
    return options.open_recipe(None, options.overrides(**flags))  # type: ignore[arg-type]


def test_every_flag_reaches_its_field() -> None:
    found = opened(
        model="m", data="d.csv", text_column="body", label_column="kind", labels="a, b,c",
        training_seed=3, evaluation_seed=4,
    )  # fmt: skip
    assert found.model == "m"
    assert (found.data.source, found.data.text, found.data.label) == ("d.csv", "body", "kind")
    assert found.data.labels == ["a", "b", "c"]
    assert (found.training.seed, found.evaluation.seed) == (3, 4)


def test_without_a_recipe_the_one_for_own_texts_is_the_base() -> None:
    own = recipe.load("your-data")
    assert opened().model_copy(update={"name": own.name, "description": own.description}) == own
    changed = opened(data="mails.csv")
    assert changed.name is None
    assert api.default_output(changed).name.startswith("mails-")


def test_label_words_and_the_names_that_mlx_lm_has() -> None:
    found = opened(
        label_words="bug = bug, not spam=fine", learning_rate=2e-4, updates=7, demonstrations="6"
    )
    assert found.prompt.label_words == {"bug": "bug", "not spam": "fine"}
    assert (found.training.learning_rate, found.training.updates) == (2e-4, 7)
    assert found.prompt.demonstrations == 6
    assert opened(label_words="letters").prompt.label_words == "letters"
    assert opened(demonstrations="auto").prompt.demonstrations == "auto"


@pytest.mark.parametrize("words", ["bug", "bug=", "=x", "a=b,,c=d"])
def test_label_words_that_are_no_pairs(words: str) -> None:
    with pytest.raises(UsageError, match="label=word"):
        options.overrides(label_words=words)


def test_an_empty_output_is_one_line() -> None:
    result = invoke("predict", "demo", "-o", "")
    assert result.exit_code == 2
    assert "the path is empty" in result.stderr


@pytest.mark.parametrize("name", ["no", "007", "a: b #c", 'q"u\\o.csv', "données 😀", "{x}"])
def test_values_are_taken_as_they_stand(name: str) -> None:
    found = opened(data=name, labels=f"{name.replace(',', '')},other")
    assert found.data.source == name
    assert found.data.labels == [name, "other"]


def test_set_has_the_last_word() -> None:
    assert opened(training_seed=3, settings=["training.seed=9"]).training.seed == 9


def test_an_unknown_setting_is_blamed_by_its_own_name() -> None:
    # The settings of own data begin with name, which the message lists among those that are known.
    with pytest.raises(UsageError, match="--set: unknown key foo"):
        opened(settings=["foo=1"])


@pytest.mark.parametrize("labels", ["one", "a,,b", ","])
def test_labels_that_name_no_classes(labels: str) -> None:
    with pytest.raises(UsageError, match="does not name two classes or more"):
        options.overrides(labels=labels)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["name=my run!"], "my-run"),
        (["data.source=/tmp/some mails.csv"], "some-mails"),
        (["data.source=owner/set"], "set"),
        (["data.source='...'"], "run"),
    ],
)
def test_run_folders_are_named_by_recipe_or_data_and_time(
    overrides: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _format: "20261124-131500")
    found = api.default_output(recipe.default(overrides))
    assert found == Path("runs") / f"{name}-20261124-131500"
