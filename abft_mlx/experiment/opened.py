"""What a recipe names, opened: model, data, prompts, and what can be measured of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from abft_mlx import adapters, data, evaluation, loading, prefix, prompts
from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.experiment import inspecting
from abft_mlx.induction import Example, HeadCensus, Heads, Window
from abft_mlx.ranks import Ranks
from abft_mlx.task import Task, least_demonstrations, open_task

# Enough for a mean number of heads in every layer.
WINDOW_PROMPTS = 32
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
    def texts(self) -> data.LabelledTexts:
        """All labelled texts of the task."""
        return self.task.texts

    @property
    def splits(self) -> data.Splits:
        """The task's disjoint parts."""
        return self.task.splits

    @property
    def space(self) -> prompts.LabelSpace:
        """The task's labels, their words and their tokens."""
        return self.task.space

    @property
    def builder(self) -> prompts.PromptBuilder:
        """Makes the task's prompts; counts the texts it shortened."""
        return self.task.builder

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """What training prompts are made of: the mixture, or the task."""
        return self.mixture or (self.task,)

    def training_prompts(self) -> list[prompts.Prompt]:
        """The training prompts: k + 1 rows of the training split each, the last one the query.

        A mixture's prompts come from its tasks in turn, ``training.examples`` in all.
        """
        training = self.recipe.training
        if not self.mixture:
            return self.task.training_prompts(training)
        m = training.together
        each = -(-training.examples // (m * len(self.mixture))) * m
        share = training.model_copy(update={"examples": each})
        made = [task.training_prompts(share) for task in self.mixture]
        turns = [[ones[n : n + m] for ones in made] for n in range(0, each, m)]
        return [one for turn in turns for group in turn for one in group][: training.examples]

    def validation_prompts(self) -> list[prompts.Prompt]:
        """Queries from the validation split, demonstrations from the training split."""
        return self.task.validation_prompts(self.recipe.training)

    def test_prompts(self, limit: int | None = None) -> list[prompts.Prompt]:
        """The fixed, seeded prompts of an evaluation."""
        return self.task.test_prompts(self.recipe.evaluation, limit)

    def measure(
        self,
        chosen: list[prompts.Prompt],
        on_progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
    ) -> dict[str, Any]:
        """One method of eval's JSON of the model as it is now: its metrics and ``right``."""
        probabilities = evaluation.label_probabilities(
            self.loaded.model,
            chosen,
            self.space,
            batch_tokens=self.recipe.evaluation.batch_tokens,
            on_progress=on_progress,
            ranks=ranks,
        )
        gold = np.array([one.gold for one in chosen])
        right = evaluation.right_string(probabilities, gold)
        return evaluation.summary(probabilities, gold) | {"right": right}

    def accuracy(
        self,
        chosen: list[prompts.Prompt],
        ranks: Ranks,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> float:
        """Share of prompts answered rightly, in 0..1; every rank answers its part of them."""
        return self.measure(chosen, on_progress, ranks)["accuracy"]

    def measure_all(
        self,
        on_progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
        on_stage: Callable[[str], None] | None = None,
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
            on_progress=on_progress,
            on_stage=on_stage,
            ranks=ranks,
        )

    def census(
        self,
        chosen: list[prompts.Prompt],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> HeadCensus:
        """What every head does with the label tokens of some prompts."""
        return inspecting.census(
            self.loaded.model,
            chosen,
            max_tokens=self.recipe.evaluation.batch_tokens,
            on_progress=on_progress,
        )

    def heads(
        self,
        chosen: list[prompts.Prompt],
        *,
        detectors: bool = False,
        examples: int = inspecting.EXAMPLES,
        adapter: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Heads:
        """What is to be seen of the model's heads; without and with its adapter, if it has one.

        Args:
            chosen: prompts for the census; the first of every class in turn become examples.
            detectors: also score every head on repeated random tokens.
            examples: prompts whose rows are kept.
            adapter: what to call the adapter in the facts.
            on_progress: told how many prompts of how many are done.
        """
        return inspecting.inspect(
            self.loaded,
            self.task,
            chosen,
            max_tokens=self.recipe.evaluation.batch_tokens,
            detectors=detectors,
            examples=examples,
            seed=self.recipe.evaluation.seed,
            facts={"k": self.recipe.prompt.demonstrations, "adapter": adapter},
            on_progress=on_progress,
        )

    def example(self, prompt: prompts.Prompt) -> Example:
        """A prompt's token texts and every head's last row, without and with an adapter.

        Args:
            prompt: one of the experiment's, or of its ``builder``'s own making.
        """
        return inspecting.example(self.loaded, prompt)

    def with_layers(
        self,
        training_prompts: list[prompts.Prompt],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Experiment:
        """The same with ``adapter.layers`` auto made into layer numbers; itself where it is not.

        Args:
            training_prompts: the run's; the first few are looked at, by the model as it is now.
            on_progress: told how many prompts of how many are done.
        """
        if self.recipe.adapter.layers != "auto":
            return self
        found = Window.of(self.census(training_prompts[:WINDOW_PROMPTS], on_progress))
        adapter = self.recipe.adapter.model_copy(update={"layers": found.layers})
        return replace(
            self,
            recipe=self.recipe.model_copy(update={"adapter": adapter}),
            window=found,
        )


def prepare(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    processes: int = 1,
    on_stage: Callable[[str], None] | None = None,
    trained_on: str | None = None,
) -> Experiment:
    """Open everything that a recipe names, and check that it fits together.

    Args:
        recipe: what to open.
        adapter: a run folder, adapter folder or hub id of what to put on the model.
        processes: that will share every update.
        on_stage: told what is opened.
        trained_on: fingerprint of the texts that a run was trained on; all rows of other texts
            are test rows.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    recipe = recipes.resolve(recipe)
    others = recipe.evaluation.transfer if "transfer" in recipe.evaluation.protocols else []
    if not others and "transfer" in recipe.evaluation.protocols:
        raise RecipeError(
            "protocol transfer measures on other tasks and evaluation.transfer is empty; name "
            "recipes of other tasks there, or with --transfer"
        )
    sections = [recipes.task(recipe), *recipe.mixture, *others]
    # Texts first: a model may have to be downloaded.
    tell = on_stage or (lambda _what: None)
    texts = []
    for section in sections:
        tell(f"reading {section.data.source}")
        texts.append(data.load(section.data))
    splits = [
        data.split(read, section.data, least_demonstrations(section))
        for section, read in zip(sections, texts, strict=True)
    ]
    if trained_on not in (None, texts[0].fingerprint()):
        splits[0] = data.all_test(texts[0])
    tell(f"opening {recipe.model}")
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    task, *more = (
        open_task(section, read, loaded.tokenizer, loaded.context_tokens, parts)
        for section, read, parts in zip(sections, texts, splits, strict=True)
    )
    count = len(recipe.mixture)
    recipe = fitted(recipe, loaded, task, more[:count])
    recipe = recipes.share(recipe, processes, able=prefix.shareable(loaded.model))
    return Experiment(recipe, loaded, task, tuple(more[:count]), tuple(more[count:]))


def fitted(
    recipe: recipes.Recipe, loaded: loading.Loaded, task: Task, mixture: list[Task]
) -> recipes.Recipe:
    """The recipe with what depends on texts and model written out, so that it can be run again."""
    adapter = recipe.adapter
    if adapter.kind == "paper":
        large = loading.parameter_count(loaded.model) > FULL_PARAMETERS
        kind: Literal["lora", "full"] = (
            "lora" if large or "quantization" in loaded.config else "full"
        )
        recipe = recipes.resolve(
            recipe.model_copy(update={"adapter": adapter.model_copy(update={"kind": kind})})
        )
    recipe = recipe.model_copy(
        update={
            "prompt": task.section.prompt,
            "mixture": [one.section for one in mixture],
        }
    )
    recipes.check_mixture(task.demonstrations, recipe.mixture)
    return recipe
