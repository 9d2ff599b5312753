"""The fast modes from a recipe: whole runs, resumed runs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cli_support import document, invoke
from mlx.utils import tree_flatten
from test_trainer import make_prompts, make_recipe, make_trainer

from abft_mlx import prefix, study
from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.experiment import prepare
from abft_mlx.trainer import RunFolder

LOCAL, SHARED = "training.gradient=local", "training.shared_demonstrations=2"


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


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


def test_a_number_or_auto_is_wanted() -> None:
    said = "is 'often': a whole number of at least 1, or auto, is needed"
    for name in ("shared_demonstrations", "micro_batch_tokens"):
        with pytest.raises(RecipeError, match=f"training.{name} {said}"):
            recipes.load("demo", [f"training.{name}=often"])


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
        # Unless it is told, it is as many as divide the update, up to eight.
        assert saved.shared_demonstrations == (2 if SHARED in settings else 8)


class TestHowManyShare:
    """``training.shared_demonstrations`` auto."""

    @pytest.mark.parametrize(
        ("settings", "processes", "m"),
        [
            ((), 1, 8),
            ((), 4, 8),
            ((), 5, 4),
            ((), 16, 2),
            ((), 32, 1),
            ((LOCAL,), 1, 8),
            (("training.prompts_per_update=12",), 1, 4),
            (("training.prompts_per_update=14", "training.examples=49"), 1, 7),
            (("training.examples=513",), 1, 1),
            (("objective.kind=end_to_end",), 1, 8),
            (("adapter.layers=auto",), 1, 1),
            (("adapter.layers=[1]",), 1, 1),
            (("training.gradient_checkpointing=true",), 1, 1),
            (("training.shared_demonstrations=4",), 1, 4),
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

    def test_is_one_in_the_papers_recipes_and_in_studies(self) -> None:
        for name in recipes.shipped():
            shared = recipes.load(name).training.shared_demonstrations
            own = name in ("demo", "your-data") or name.startswith("generated/")
            assert shared == ("auto" if own else 1), name
        chosen = study.loads("name: s\ntasks: [demo]\nmodels: [demo]\nmethods: [abft]")
        (cell,) = study.cells(chosen)
        assert cell.recipe.training.shared_demonstrations == 1
