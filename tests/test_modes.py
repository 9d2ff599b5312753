"""Shared demonstrations in whole runs and resumed ones, and how many prompts share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_trainer import make_prompts, make_recipe, make_trainer, same, trained

from abft_mlx import prefix
from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.experiment import prepare
from abft_mlx.trainer import RunFolder

SHARED = "training.shared_demonstrations=2"


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def shared_prompts() -> list[Any]:
    """Pairs of prompts with the same first twelve tokens, labels among them."""
    prompts = make_prompts()
    made = []
    for one, other in zip(prompts[::2], prompts[1::2], strict=True):
        positions = max(one.label_positions) + 1
        tokens = one.token_ids[:positions] + other.token_ids[positions:]
        made += [
            one,
            type(one)(
                tokens, one.label_positions, one.demonstration_labels, other.gold, other.target
            ),
        ]
    return made


def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    recipe = make_recipe(SHARED, "training.updates=4", "training.checkpoint_every=2")

    def trainer(name: str, updates: int = 4) -> Any:
        folder = RunFolder(tmp_path / name)
        if not folder.path.exists():
            folder.create()
        chosen = recipes.resolve(recipe)
        training = chosen.training.model_copy(update={"updates": updates})
        made = make_trainer(chosen.model_copy(update={"training": training}), folder)
        made.prompts = shared_prompts()
        return made

    whole = trainer("whole")
    whole.run()
    trainer("cut", 2).run()
    again = trainer("cut")
    again.run(resume=True)
    assert same(trained(again.model), trained(whole.model))


def test_an_update_takes_whole_groups_and_computes_their_beginnings_once() -> None:
    seen = []
    trainer = make_trainer(make_recipe(SHARED, "training.updates=3"))
    trainer.prompts = shared_prompts()
    gradients = trainer.step.gradients

    def noted(batches: Any, weight: float) -> Any:
        seen.append(batches)
        return gradients(batches, weight)

    trainer.step.gradients = noted
    trainer.run()
    for batches in seen:
        assert sum(one.prompts for one in batches) == 8
        assert sum(len(one.prefix) for one in batches) == 4
        assert all(one.prefix.shape[1] > 0 for one in batches)


def test_groups_must_be_whole() -> None:
    with pytest.raises(RecipeError, match="shared_demonstrations 3 does not divide examples 512"):
        recipes.load("demo", ["training.shared_demonstrations=3"])


class TestHowManyShare:
    """``training.shared_demonstrations`` auto."""

    @pytest.mark.parametrize(
        ("settings", "processes", "m"),
        [
            ((), 1, 8),
            ((), 5, 4),
            ((), 32, 1),
            (("training.prompts_per_update=12",), 1, 4),
            (("training.prompts_per_update=14", "training.examples=49"), 1, 7),
            (("adapter.layers=auto",), 1, 8),
            (("training.gradient_checkpointing=true",), 1, 1),
            (("training.shared_demonstrations=4",), 32, 4),
        ],
    )
    def test_is_up_to_eight(self, settings: tuple[str, ...], processes: int, m: int) -> None:
        recipe = recipes.resolve(recipes.load("demo", list(settings)))
        assert recipes.share(recipe, processes).training.shared_demonstrations == m

    def test_is_one_where_the_model_cannot(self, tiny: ModuleType) -> None:
        shares = {
            name: prefix.shareable(tiny.build(name))
            for name in ("llama", "gpt2", "gemma2", "qwen3_next", "gemma3n", "mamba2")
        }
        assert shares == {
            "llama": True,
            "gpt2": True,
            "gemma2": True,
            "qwen3_next": False,
            "gemma3n": False,
            "mamba2": False,
        }

    def test_is_one_in_a_run_of_such_a_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = recipes.load("demo")
        assert prepare(recipe).recipe.training.shared_demonstrations == 8
        monkeypatch.setattr(prefix, "shareable", lambda _: False)
        assert prepare(recipe).recipe.training.shared_demonstrations == 1
        asked = recipes.load("demo", [SHARED])
        assert prepare(asked).recipe.training.shared_demonstrations == 2
