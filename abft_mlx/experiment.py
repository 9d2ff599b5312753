"""From a recipe to a trained adapter or to measured accuracy: the rooms put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abft_mlx import adapters, attention, data, evaluation, facts, loading, prompts, runtime
from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.induction import HeadCensus, Window
from abft_mlx.ranks import Ranks
from abft_mlx.task import Task, open_task
from abft_mlx.trainer import Progress, RunFolder, Trainer, Update

# Enough for a mean number of heads in every layer.
WINDOW_PROMPTS = 32


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
        m = training.shared_demonstrations
        each = -(-training.examples // (m * len(self.mixture))) * m
        share = training.model_copy(update={"examples": each})
        made = [task.training_prompts(share) for task in self.mixture]
        turns = [[ones[n : n + m] for ones in made] for n in range(0, each, m)]
        return [one for turn in turns for group in turn for one in group][: training.examples]

    def validation_prompts(self) -> list[prompts.Prompt]:
        """Queries from the validation split, demonstrations from the training split."""
        return self.task.validation_prompts(self.recipe.training)

    def test_prompts(self) -> list[prompts.Prompt]:
        """The fixed, seeded prompts of an evaluation."""
        return self.task.test_prompts(self.recipe.evaluation)

    def measure(
        self,
        chosen: list[prompts.Prompt],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """One method of eval's JSON of the model as it is now: its metrics and ``right``."""
        probabilities = evaluation.label_probabilities(
            self.loaded.model,
            chosen,
            self.space,
            batch_tokens=self.recipe.evaluation.batch_tokens,
            on_progress=on_progress,
        )
        gold = np.array([one.gold for one in chosen])
        right = evaluation.right_string(probabilities, gold)
        return evaluation.summary(probabilities, gold) | {"right": right}

    def accuracy(self, chosen: list[prompts.Prompt], ranks: Ranks) -> float:
        """Share of prompts answered rightly, in 0..1; every rank answers its part of them."""
        if ranks.size == 1:
            return self.measure(chosen)["accuracy"]
        own = chosen[ranks.rank :: ranks.size]
        right = self.measure(own)["right"].count("1") if own else 0
        return ranks.count(right) / len(chosen)

    def measure_all(self, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
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
        )

    def census(self, chosen: list[prompts.Prompt]) -> HeadCensus:
        """What every head does with the label tokens of some prompts."""
        census = HeadCensus()
        for batch in prompts.batches(chosen, max_tokens=self.recipe.evaluation.batch_tokens):
            last = mx.array(batch.last)
            census.add(
                attention.capture(self.loaded.model, mx.array(batch.tokens), last),
                mx.array(batch.label_positions),
                mx.array(batch.demonstration_labels),
                mx.array(batch.gold),
                last,
            )
        return census

    def with_layers(self, training_prompts: list[prompts.Prompt]) -> Experiment:
        """The same with ``adapter.layers`` auto made into layer numbers; itself where it is not.

        Args:
            training_prompts: the run's; the first few are looked at, by the model as it is now.
        """
        if self.recipe.adapter.layers != "auto":
            return self
        found = Window.of(self.census(training_prompts[:WINDOW_PROMPTS]))
        adapter = self.recipe.adapter.model_copy(update={"layers": found.layers})
        return replace(
            self,
            recipe=self.recipe.model_copy(update={"adapter": adapter}),
            window=found,
        )


@dataclass(frozen=True)
class RunResult:
    """What a finished fine-tuning run came to.

    Attributes:
        experiment: with the fine-tuned model in it, and the recipe with the layers that trained.
        progress: updates, seconds, validations, peak memory.
        output: the run folder.
        trainable_parameters: numbers that were trained.
        adapter_bytes: size of ``adapters.safetensors``; 0 on a rank that did not write it.
    """

    experiment: Experiment
    progress: Progress
    output: Path
    trainable_parameters: int
    adapter_bytes: int


def prepare(recipe: recipes.Recipe, adapter: str | Path | None = None) -> Experiment:
    """Open everything that a recipe names, and check that it fits together.

    Args:
        recipe: what to open.
        adapter: a run folder or mlx-lm adapter folder to put on the model.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    recipe = recipes.resolve(recipe)
    recipes.check_mixture(recipe.prompt.demonstrations, recipe.mixture)
    others = recipe.evaluation.transfer if "transfer" in recipe.evaluation.protocols else []
    if not others and "transfer" in recipe.evaluation.protocols:
        raise RecipeError(
            "protocol transfer measures on other tasks and evaluation.transfer is empty; name "
            "recipes of other tasks there, or with --transfer"
        )
    sections = [recipes.task(recipe), *recipe.mixture, *others]
    # Texts first: a model may have to be downloaded.
    texts = [data.load(section.data) for section in sections]
    for section, read in zip(sections, texts, strict=True):
        data.split(read, section.data, section.prompt.demonstrations)
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    task, *more = (
        open_task(section, read, loaded.tokenizer, loaded.context_tokens)
        for section, read in zip(sections, texts, strict=True)
    )
    count = len(recipe.mixture)
    return Experiment(recipe, loaded, task, tuple(more[:count]), tuple(more[count:]))


def train(
    experiment: Experiment,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_prepared: Callable[[Experiment, int], None] | None = None,
    on_update: Callable[[Update], None] | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Fine-tune the experiment's model with ABFT and write its run folder.

    Args:
        experiment: from :func:`prepare`, without an adapter; its model is changed in place.
        output: the run folder.
        overwrite: replace a run that lies there.
        resume: go on from the checkpoint that lies there.
        on_prepared: told once, before training, of the experiment and its trainable parameters.
        on_update: told of every update.
        ranks: the processes that train together; the first one writes the folder.

    Raises:
        UsageError: something does not fit, or the folder cannot be used.
        RunError: the loss stopped being finite, the disk is full, or a rank is gone.
    """
    ranks = ranks or Ranks()
    model, folder = experiment.loaded.model, RunFolder(Path(output))
    training_prompts = experiment.training_prompts()
    if resume:
        found = folder.read_run().get("window")
        experiment = replace(experiment, window=Window(**found) if found else None)
    experiment = experiment.with_layers(training_prompts)
    recipe = experiment.recipe
    validation = experiment.validation_prompts() if recipe.training.validate_every else []
    adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
    fingerprint = facts.fingerprint(recipe, experiment.loaded, experiment.trained_tasks)
    trainer = Trainer(
        model,
        training_prompts,
        recipe,
        folder=folder,
        validate=lambda: experiment.accuracy(validation, ranks),
        on_update=on_update,
        fingerprint=fingerprint,
        ranks=ranks,
    )
    ranks.agree(fingerprint, "recipe, model, data or version")
    if not resume and ranks.first:
        folder.create(overwrite=overwrite)
        recipes.save(recipe, folder.path / "recipe.yaml")
        folder.write_run(_facts(experiment))
    trainable = adapters.trainable_parameters(model)
    if on_prepared is not None:
        on_prepared(experiment, trainable)
    progress = trainer.run(resume=resume)
    if not ranks.first:
        ranks.wait()
        return RunResult(experiment, progress, folder.path, trainable, 0)
    adapters.save(model, folder.path, base_model=recipe.model)
    adapter_bytes = (folder.path / "adapters.safetensors").stat().st_size
    totals = {
        "updates": progress.updates,
        "seen_examples": progress.updates * recipe.training.prompts_per_update,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "process_peak_bytes": runtime.process_peak_bytes(),
        "adapter_bytes": adapter_bytes,
        "micro_batch_prompts": trainer.rows,
        "compiled_shapes": sorted(trainer.step.shapes),
    }
    if ranks.size > 1:
        totals["processes"] = ranks.size
    written = {**_facts(experiment), "finished": True, "totals": totals}
    if progress.validations:
        written["validation"] = {
            "prompts": len(validation),
            "before": progress.validations[0][1],
            "after": progress.validations[-1][1],
            "best": progress.best_accuracy,
            "best_update": progress.best_update,
            "kept_update": progress.best_update if recipe.training.keep_best else progress.updates,
        }
    folder.write_run(written)
    ranks.wait()
    return RunResult(experiment, progress, folder.path, trainable, adapter_bytes)


def finetune(
    recipe: recipes.Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    on_prepared: Callable[[Experiment, int], None] | None = None,
    on_update: Callable[[Update], None] | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Run a recipe: open what it names, fine-tune with ABFT, write the run folder.

    Args:
        recipe: the run.
        output: the run folder.
        overwrite: replace a run that lies there.
        on_prepared: told once, before training, of the experiment and its trainable parameters.
        on_update: told of every update.
        ranks: the processes that train together; the first one writes the folder.
    """
    # The first rank may have made the folder before another looks.
    if ranks is None or ranks.first:
        RunFolder(Path(output)).check(overwrite=overwrite)
    return train(
        prepare(recipe),
        output,
        overwrite=overwrite,
        on_prepared=on_prepared,
        on_update=on_update,
        ranks=ranks,
    )


def resume(
    output: str | Path,
    *,
    on_prepared: Callable[[Experiment, int], None] | None = None,
    on_update: Callable[[Update], None] | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Continue the run in a folder from its checkpoint, with the recipe that lies there."""
    folder = RunFolder(Path(output))
    folder.read_run()
    recipe = recipes.load(str(folder.path / "recipe.yaml"))
    return train(
        prepare(recipe),
        output,
        resume=True,
        on_prepared=on_prepared,
        on_update=on_update,
        ranks=ranks,
    )


def evaluate(
    recipe: recipes.Recipe,
    adapter: str | Path | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model on fixed seeded test prompts, without and with an adapter.

    Args:
        recipe: names model, data, prompts and the evaluation's size.
        adapter: a run folder or mlx-lm adapter folder, or None.
        on_progress: told how many prompts of how many are done, of one measurement at a time.

    Returns:
        The document of DESIGN.md, section 5. Its parts describe the model with the adapter where
        there is one; ``base`` then holds the same parts without it, and ``comparisons`` also every
        method against itself without the adapter.
    """
    experiment = prepare(recipe, adapter)
    section = recipe.evaluation
    document: dict[str, Any] = {
        "schema": facts.SCHEMA,
        "model": recipe.model,
        "adapter": None if adapter is None else str(adapter),
        "data": recipe.data.source,
        "labels": list(experiment.space.names),
        "label_words": list(experiment.space.words),
        "chat_template": experiment.task.chat_template,
        "k": recipe.prompt.demonstrations,
        "prompts": experiment.task.test_queries(section) * section.repeats,
        "seed": section.seed,
        "compat": section.compat,
    }
    document |= experiment.measure_all(on_progress)
    if adapter is not None:
        adapters.detach(experiment.loaded.model)
        document["base"] = experiment.measure_all(on_progress)
        if "methods" in document:
            document["comparisons"] += evaluation.against_base(
                document["methods"], document["base"]["methods"]
            )
    return document


def _facts(experiment: Experiment) -> dict[str, Any]:
    known = facts.of_run(
        experiment.recipe, experiment.loaded, experiment.task, experiment.trained_tasks
    )
    return known | ({"window": asdict(experiment.window)} if experiment.window else {})
