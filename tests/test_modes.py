"""The fast modes from a recipe: whole runs, resumed runs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import document, invoke
from mlx.utils import tree_flatten
from test_trainer import make_prompts, make_recipe, make_trainer

from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.trainer import RunFolder

LOCAL, SHARED = "training.gradient=local", "training.shared_demonstrations=2"


def trained(trainer: Any) -> dict[str, np.ndarray]:
    return {n: np.array(one) for n, one in tree_flatten(trainer.model.trainable_parameters())}


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


@pytest.mark.parametrize("settings", [(LOCAL,), (SHARED,), (LOCAL, SHARED)])
def test_a_resumed_run_of_each_mode_ends_as_an_undisturbed_one(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    recipe = make_recipe(*settings, "training.updates=4", "training.checkpoint_every=2")

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
    ours, theirs = trained(again), trained(whole)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_an_update_takes_whole_groups_and_computes_their_beginnings_once() -> None:
    seen = []
    trainer = make_trainer(make_recipe(SHARED, "training.updates=3"))
    trainer.prompts = shared_prompts()
    update = trainer.step.update

    def noted(batches: Any, weight: float, *_: Any) -> Any:
        seen.append(batches)
        return update(batches, weight)

    trainer.step.update = noted
    trainer.run()
    for batches in seen:
        assert sum(one.prompts for one in batches) == 8
        assert sum(len(one.prefix) for one in batches) == 4
        assert all(one.prefix.shape[1] > 0 for one in batches)


def test_groups_must_be_whole() -> None:
    with pytest.raises(RecipeError, match="shared_demonstrations 3 does not divide examples 512"):
        recipes.load("demo", ["training.shared_demonstrations=3"])


def test_finetune_in_the_fast_modes(tmp_path: Path) -> None:
    """The bundled model on a generated task: the loss falls in each mode."""
    small = ["training.updates=3", "training.prompts_per_update=8", "training.examples=16"]
    for number, settings in enumerate(([LOCAL], [SHARED], [LOCAL, SHARED])):
        output = tmp_path / str(number)
        words = [word for one in (*small, *settings) for word in ("--set", one)]
        result = invoke("finetune", "demo", "--output", output, "--json", *words)
        assert result.exit_code == 0, result.stderr
        assert document(result)
        lines = (output / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 3
        saved = recipes.load(str(output / "recipe.yaml")).training
        assert saved.gradient == ("local" if LOCAL in settings else "exact")
        assert saved.shared_demonstrations == (2 if SHARED in settings else 1)
