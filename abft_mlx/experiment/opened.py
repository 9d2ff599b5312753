"""What a recipe names, opened: model, data, prompts, and what can be measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from abft_mlx import adapters, data, evaluation, loading, prefix
from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.events import Events
from abft_mlx.experiment import looking
from abft_mlx.induction import Example, HeadCensus, Heads, Window
from abft_mlx.prompts import Prompt, Prompts
from abft_mlx.ranks import Ranks
from abft_mlx.task import Task, least_demonstrations, open_task

# The paper trains W_Q and W_K themselves up to this size, and LoRA above.
FULL_PARAMETERS = 10e9


@dataclass(frozen=True)
class Experiment:
    """A recipe with everything that it names opened and checked.

    Attributes:
        recipe: the resolved recipe.
        loaded: model, tokenizer and what is known of them.
        task: what is measured, and trained on unless there is a mixture.
        mixture: the tasks that are trained on at once, if the recipe names several.
        others: the tasks that the transfer protocol measures on.
        window: how the recipe's ``adapter.layers`` were found, where a census did.
    """

    recipe: recipes.Recipe
    loaded: loading.Loaded
    task: Task
    mixture: tuple[Task, ...] = ()
    others: tuple[Task, ...] = ()
    window: Window | None = None

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """What training prompts are made of: the mixture, or the task."""
        return self.mixture or (self.task,)

    def training_prompts(self) -> Prompts:
        """The training prompts: k + 1 rows of the training split each, the last one the query.

        A mixture's prompts come from its tasks in turn, ``training.examples`` in all.
        """
        training, tasks = self.recipe.training, self.trained_tasks
        m, count = training.together, len(self.trained_tasks)
        each = -(-training.examples // (m * count)) * m if self.mixture else training.examples
        share = training.model_copy(update={"examples": each})
        made = [task.training_prompts(share) for task in tasks]
        if len(made) == 1:
            return made[0]

        def build(number: int) -> Prompt:
            group, place = divmod(number, m)
            return made[group % count][group // count * m + place]

        return Prompts(training.examples, build)

    def validation_prompts(self) -> Prompts:
        """Queries from the validation split, demonstrations from the training split."""
        return self.task.validation_prompts(self.recipe.training)

    def test_prompts(self) -> Prompts:
        """The fixed, seeded prompts of an evaluation."""
        return self.task.test_prompts(self.recipe.evaluation)

    def measure(
        self, chosen: Sequence[Prompt], events: Events | None = None, ranks: Ranks | None = None
    ) -> dict[str, Any]:
        """One method of eval's JSON of the model as it is now: its metrics and ``right``."""
        probabilities = evaluation.label_probabilities(
            self.loaded.model,
            chosen,
            self.task.space,
            batch_tokens=self.recipe.evaluation.batch_tokens,
            on_progress=(events or Events()).progress,
            ranks=ranks,
        )
        gold = np.array([prompt.gold for prompt in chosen])
        right = evaluation.right_string(probabilities, gold)
        return evaluation.summary(probabilities, gold) | {"right": right}

    def measure_all(
        self, events: Events | None = None, ranks: Ranks | None = None
    ) -> dict[str, Any]:
        """What the recipe's evaluation section asks for, of the model as it is now.

        Returns:
            Parts of eval's JSON: ``methods``, ``comparisons``, ``robustness`` and so on.
        """
        return evaluation.measure(
            self.loaded.model,
            self.task,
            self.recipe.evaluation,
            trained=self.trained_tasks,
            others=self.others,
            events=events,
            ranks=ranks,
        )

    def census(self, chosen: Sequence[Prompt], events: Events | None = None) -> HeadCensus:
        """What every head does with the label tokens of some prompts."""
        return looking.census(
            self.loaded.model,
            chosen,
            max_tokens=self.recipe.evaluation.batch_tokens,
            on_progress=(events or Events()).progress,
        )

    def heads(
        self,
        chosen: Sequence[Prompt],
        *,
        detectors: bool = False,
        examples: int = looking.EXAMPLES,
        adapter: str | None = None,
        events: Events | None = None,
    ) -> Heads:
        """What the model's heads do; without and with its adapter, if it has one.

        Args:
            chosen: prompts for the census; the first of every class in turn become examples.
            detectors: also score every head on repeated random tokens.
            examples: prompts whose rows are kept.
            adapter: what to call the adapter in the facts.
            events: who hears of the progress.
        """
        return looking.inspect(
            self.loaded,
            self.task,
            chosen,
            max_tokens=self.recipe.evaluation.batch_tokens,
            detectors=detectors,
            examples=examples,
            seed=self.recipe.evaluation.seed,
            facts={"k": self.recipe.prompt.demonstrations, "adapter": adapter},
            on_progress=(events or Events()).progress,
        )

    def example(self, prompt: Prompt) -> Example:
        """A prompt's token texts and every head's last row, without and with an adapter.

        Args:
            prompt: one of the experiment's, or of its task's builder.
        """
        return looking.example(self.loaded, prompt)


def prepare(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    processes: int = 1,
    events: Events | None = None,
    trained_on: str | None = None,
) -> Experiment:
    """Open everything that a recipe names, and check that it fits together.

    Args:
        recipe: what to open.
        adapter: a run folder, adapter folder or hub id of what to put on the model.
        processes: that will share every update.
        events: who hears what is opened.
        trained_on: fingerprint of the texts that a run was trained on; all rows of other texts
            are test rows.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    events, recipe = events or Events(), recipes.resolve(recipe)
    others = recipe.evaluation.transfer if "transfer" in recipe.evaluation.protocols else []
    if not others and "transfer" in recipe.evaluation.protocols:
        raise RecipeError(
            "protocol transfer measures on other tasks and evaluation.transfer is empty; name "
            "recipes of other tasks there, or with --transfer"
        )
    sections = [recipes.task(recipe), *recipe.mixture, *others]
    # Texts first: a model may have to be downloaded.
    texts = []
    for section in sections:
        events.stage(f"reading {section.data.source}")
        texts.append(data.load(section.data))
    splits = [
        data.split(read, section.data, least_demonstrations(section))
        for section, read in zip(sections, texts, strict=True)
    ]
    if trained_on not in (None, texts[0].fingerprint()):
        splits[0] = data.all_test(texts[0])
    events.stage(f"opening {recipe.model}")
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    tasks = [
        open_task(section, read, loaded.tokenizer, loaded.context_tokens, parts)
        for section, read, parts in zip(sections, texts, splits, strict=True)
    ]
    count = 1 + len(recipe.mixture)
    return _fitted(recipe, loaded, tasks[:count], tuple(tasks[count:]), processes)


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
    return _fitted(recipe, loaded, [task])


def _fitted(
    recipe: recipes.Recipe,
    loaded: loading.Loaded,
    tasks: list[Task],
    others: tuple[Task, ...] = (),
    processes: int = 1,
) -> Experiment:
    """The experiment, its recipe with what depends on texts and model written out."""
    task, *mixture = tasks
    adapter = recipe.adapter
    if adapter.kind == "paper":
        large = loading.parameter_count(loaded.model) > FULL_PARAMETERS
        kind: Literal["lora", "full"] = (
            "lora" if large or "quantization" in loaded.config else "full"
        )
        changed = adapter.model_copy(update={"kind": kind})
        recipe = recipes.resolve(recipe.model_copy(update={"adapter": changed}))
    sections = [part.section for part in mixture]
    recipe = recipe.model_copy(update={"prompt": task.section.prompt, "mixture": sections})
    recipes.check_mixture(task.demonstrations, recipe.mixture)
    recipe = recipes.share(recipe, processes, able=prefix.shareable(loaded.model))
    return Experiment(recipe, loaded, task, tuple(mixture), others)
