"""Training on texts that a Python program holds; no file is read or written for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from abft_mlx import adapters, data, loading, prefix
from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.experiment import head_weights, shipping
from abft_mlx.experiment.opened import Experiment, fitted
from abft_mlx.task import least_demonstrations, open_task
from abft_mlx.trainer import Progress, Trainer, Update


def open_texts(
    recipe: recipes.Recipe, texts: data.LabelledTexts, adapter: str | Path | None = None
) -> Experiment:
    """Open a recipe's model for texts that stand in for the recipe's data.

    Args:
        recipe: model, prompts and training; of its data section only sizes and seed are used.
        texts: all of them are for training and validation.
        adapter: a run folder or mlx-lm adapter folder to put on the model.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    recipe = recipes.resolve(recipe)
    if recipe.mixture:
        raise RecipeError(
            f"mixture names {len(recipe.mixture)} tasks, and only the texts given here are trained "
            "on; leave it out, or use abft_mlx.finetune"
        )
    section = recipes.task(recipe)
    everything = section.data.model_copy(update={"holdout": "none"})
    splits = data.split(texts, everything, least_demonstrations(section))
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    task = open_task(section, texts, loaded.tokenizer, loaded.context_tokens, splits)
    recipe = fitted(recipe, loaded, task, [])
    recipe = recipes.share(recipe, able=prefix.shareable(loaded.model))
    return Experiment(recipe, loaded, task)


def fit(
    experiment: Experiment, on_update: Callable[[Update], None] | None = None
) -> tuple[Experiment, Progress]:
    """Fine-tune the experiment's model in place, as :func:`train` does, without a run folder.

    Args:
        experiment: from :func:`open_texts`, without an adapter.
        on_update: told of every update.

    Returns:
        The experiment with the layers that trained in its recipe, and what the run came to.

    Raises:
        UsageError: something does not fit.
        RunError: the loss stopped being finite, or memory does not suffice.
    """
    chosen = experiment.training_prompts()
    experiment = experiment.with_layers(chosen)
    recipe, model = experiment.recipe, experiment.loaded.model
    adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
    if recipe.objective.kind == "read_out":
        head_weights.fit(experiment, chosen)

    def validate() -> float:
        accuracy = shipping.choose(experiment, draws=1)[1]
        assert accuracy is not None
        return accuracy

    trainer = Trainer(
        model,
        chosen,
        recipe,
        validate=validate if len(experiment.splits.validation) else None,
        on_update=on_update,
    )
    return experiment, trainer.run()
