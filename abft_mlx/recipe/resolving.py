"""What depends on other settings of a recipe, filled in, so that it alone reproduces the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from abft_mlx.errors import RecipeError
from abft_mlx.recipe._training import FULL_LEARNING_RATE, LORA_LEARNING_RATE
from abft_mlx.recipe.sections import Recipe, TaskSection

# Of eight prompts that share demonstrations, those are a third of all tokens at k = 4.
MOST_TOGETHER = 8
# A read-out's queries centre each other, so their mean should be steady.
MOST_CENTRED = 16


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what depends on other settings, so that the recipe alone reproduces the run."""
    # Which of the two rates paper means is known once the model is open.
    if recipe.training.learning_rate is None and recipe.adapter.kind != "paper":
        rate = LORA_LEARNING_RATE if recipe.adapter.kind == "lora" else FULL_LEARNING_RATE
        training = recipe.training.model_copy(update={"learning_rate": rate})
        recipe = recipe.model_copy(update={"training": training})
    if recipe.objective.layers is None:
        counting = "trained" if recipe.adapter.layers == "auto" else "all"
        objective = recipe.objective.model_copy(update={"layers": counting})
        recipe = recipe.model_copy(update={"objective": objective})
    if recipe.prompt.chat:
        transfer = [_in_turns(task) for task in recipe.evaluation.transfer]
        evaluation = recipe.evaluation.model_copy(update={"transfer": transfer})
        mixture = [_in_turns(task) for task in recipe.mixture]
        recipe = recipe.model_copy(update={"mixture": mixture, "evaluation": evaluation})
    return recipe


def share(recipe: Recipe, processes: int = 1, able: bool = True) -> Recipe:
    """Make ``training.shared_demonstrations`` auto into a number.

    It is the largest one up to 8 (16 for a read-out) that divides what it must, and leaves every
    process a group. Without a read-out it is 1 with gradient checkpointing and with
    ``prompt.selection: nearest``.

    Args:
        recipe: the run.
        processes: that share every update.
        able: False makes it 1, as it is in the paper: for a model that cannot share.
    """
    training = recipe.training
    if training.shared_demonstrations != "auto":
        return recipe
    read = recipe.objective.kind == "read_out"
    prompts = [recipe.prompt, *(task.prompt for task in recipe.mixture)]
    nearest = any(prompt.selection == "nearest" for prompt in prompts)
    alone = not able or training.gradient_checkpointing
    most = MOST_CENTRED if read else 1 if alone or nearest else MOST_TOGETHER
    whole = math.gcd(training.examples, training.prompts_per_update)
    sizes = [m for m in range(2, most + 1) if whole % m == 0]
    fitting = [m for m in sizes if training.prompts_per_update // m >= processes]
    if read and not fitting:
        raise RecipeError(
            f"training.examples {training.examples} and training.prompts_per_update "
            f"{training.prompts_per_update} have no groups of 2 to {most} prompts, which "
            "objective.kind read_out needs; choose multiples of 16"
        )
    training = training.model_copy(update={"shared_demonstrations": max(fitting, default=1)})
    return recipe.model_copy(update={"training": training})


def check_mixture(demonstrations: int | str, mixed: Sequence[TaskSection]) -> None:
    """Check that the prompts of a mixture's tasks can share a batch.

    Args:
        demonstrations: k of the recipe.
        mixed: the tasks that are trained on at once.

    Raises:
        RecipeError: one has another number of demonstrations.
    """
    for task in mixed:
        if task.prompt.demonstrations != demonstrations:
            raise RecipeError(
                f"mixture: {task.name} has {task.prompt.demonstrations} demonstrations, the "
                f"recipe {demonstrations}; give all tasks of a mixture the same "
                "prompt.demonstrations"
            )


def _in_turns(section: TaskSection) -> TaskSection:
    """A task whose prompts are chats."""
    prompt = section.prompt.model_copy(update={"chat": True})
    return section.model_copy(update={"prompt": prompt})
