"""From a recipe to a trained adapter, to measured accuracy, or to what its heads do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from abft_mlx import adapters, evaluation, facts, runtime
from abft_mlx import recipe as recipes
from abft_mlx.experiment.opened import Experiment, prepare
from abft_mlx.induction import HEADS_FILE, Heads, Window, write_heads
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import Progress, RunFolder, StoppedError, Trainer, Update

# Enough for a head's mean attention to two digits.
HEADS_PROMPTS = 128
# Enough for a head's mean attention to a digit or two, in a small part of an evaluation's time.
SEEN_PROMPTS = 64


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


def train(
    experiment: Experiment,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_prepared: Callable[[Experiment, int], None] | None = None,
    on_update: Callable[[Update], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
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
        on_stage: told what is done before, between and after updates; "" where it is over.
        on_progress: told how many prompts of how many of such a stage are done.
        ranks: the processes that train together; the first one writes the folder.

    Raises:
        UsageError: something does not fit, or the folder cannot be used.
        RunError: the loss stopped being finite (the last good adapter is kept), the disk is full,
            or a rank is gone.
    """
    ranks = ranks or Ranks()
    model, folder = experiment.loaded.model, RunFolder(Path(output))
    tell = on_stage or _nothing
    tell("making training prompts")
    training_prompts = experiment.training_prompts()
    if resume:
        found = folder.read_run().get("window")
        experiment = replace(experiment, window=Window(**found) if found else None)
    if experiment.recipe.adapter.layers == "auto":
        tell("looking for layers with induction heads")
    experiment = experiment.with_layers(training_prompts, on_progress)
    recipe = experiment.recipe
    validation = experiment.validation_prompts() if recipe.training.validate_every else []

    def validate() -> float:
        tell("validation")
        accuracy = experiment.accuracy(validation, ranks, on_progress)
        tell("")
        return accuracy

    adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
    fingerprint = facts.fingerprint(recipe, experiment.loaded, experiment.trained_tasks)
    trainer = Trainer(
        model,
        training_prompts,
        recipe,
        folder=folder,
        validate=validate,
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
    try:
        progress = trainer.run(resume=resume)
    except StoppedError as error:
        if ranks.first:
            _keep_last_good(experiment, trainer.progress, folder, str(error))
        raise
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
    if progress.skipped:
        totals["skipped_updates"] = progress.skipped
    if trainer.kept_hidden is not None:
        totals["kept_hidden"] = trainer.kept_hidden
    if ranks.size > 1:
        totals["processes"] = ranks.size
    if recipe.training.census_prompts:
        tell("looking at heads")
    _keep_heads(experiment, folder, on_progress)
    written = {
        **_facts(experiment),
        "finished": True,
        "totals": totals,
        "shift": adapters.shift_norms(model),
    }
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
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Run a recipe: open what it names, fine-tune with ABFT, write the run folder.

    Args:
        recipe: the run.
        output: the run folder.
        overwrite: replace a run that lies there.
        on_prepared: told once, before training, of the experiment and its trainable parameters.
        on_update: told of every update.
        on_stage: told what is opened, and what is done before, between and after updates.
        on_progress: told how many prompts of how many of such a stage are done.
        ranks: the processes that train together; the first one writes the folder.
    """
    # The first rank may have made the folder before another looks.
    if ranks is None or ranks.first:
        RunFolder(Path(output)).check(overwrite=overwrite)
    return train(
        prepare(recipe, processes=ranks.size if ranks else 1, on_stage=on_stage),
        output,
        overwrite=overwrite,
        on_prepared=on_prepared,
        on_update=on_update,
        on_stage=on_stage,
        on_progress=on_progress,
        ranks=ranks,
    )


def resume(
    output: str | Path,
    *,
    on_prepared: Callable[[Experiment, int], None] | None = None,
    on_update: Callable[[Update], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Continue the run in a folder from its checkpoint, with the recipe that lies there."""
    folder = RunFolder(Path(output))
    folder.read_run()
    recipe = recipes.load(str(folder.path / "recipe.yaml"))
    return train(
        prepare(recipe, processes=ranks.size if ranks else 1, on_stage=on_stage),
        output,
        resume=True,
        on_prepared=on_prepared,
        on_update=on_update,
        on_stage=on_stage,
        on_progress=on_progress,
        ranks=ranks,
    )


def document(
    experiment: Experiment,
    measured: dict[str, Any],
    *,
    adapter: object = None,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Eval's document (DESIGN.md, section 5).

    Args:
        experiment: what was measured.
        measured: parts of the document, of the model with its adapter, if there is one.
        adapter: what to call it.
        base: the same parts without it.
    """
    recipe, section = experiment.recipe, experiment.recipe.evaluation
    made: dict[str, Any] = {
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
        "demonstrations": section.demonstrations,
        "compat": section.compat,
        **measured,
    }
    if base is not None:
        made["base"] = base
        if "methods" in made:
            made["comparisons"] = made["comparisons"] + evaluation.against_base(
                made["methods"], base["methods"]
            )
    return made


def evaluate(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_heads: Callable[[Heads], None] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a model on fixed seeded test prompts, without and with an adapter.

    Args:
        recipe: names model, data, prompts and the evaluation's size.
        adapter: a run folder, an adapter folder, a hub id, or None.
        on_progress: told how many prompts of how many are done, of one measurement at a time.
        on_stage: told what is opened or measured.
        on_heads: told, by the first rank, what is seen of the heads in the first test prompts;
            without it nobody looks.
        ranks: the processes that measure together; each gets the whole document.

    Returns:
        The document of DESIGN.md, section 5. Its parts describe the model with the adapter where
        there is one; ``base`` then holds the same parts without it, and ``comparisons`` also every
        method against itself without the adapter.
    """
    ranks = ranks or Ranks()
    adapter = None if adapter is None else adapters.find(adapter)
    tell = on_stage or _nothing
    experiment = prepare(recipe, adapter, on_stage=on_stage)
    if ranks.size > 1:
        tasks = (experiment.task, *experiment.trained_tasks, *experiment.others)
        fingerprint = facts.fingerprint(recipe, experiment.loaded, tasks)
        attached = "" if adapter is None else facts.weights_fingerprint(adapter.folder)
        ranks.agree(fingerprint + attached, "recipe, model, adapter, data or version")
    named = "model, " if adapter is None else "with adapter, "
    measured = experiment.measure_all(on_progress, ranks, lambda what: tell(named + what))
    base = None
    if on_heads is not None and ranks.first:
        tell("looking at heads")
        chosen = experiment.test_prompts()[:SEEN_PROMPTS]
        on_heads(experiment.heads(chosen, on_progress=on_progress))
    if adapter is not None:
        adapters.detach(experiment.loaded.model)
        base = experiment.measure_all(on_progress, ranks, lambda what: tell(f"base model, {what}"))
    return document(experiment, measured, adapter=adapter, base=base)


def heads(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    *,
    prompts: int = HEADS_PROMPTS,
    detectors: bool = True,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Heads:
    """See what a model's heads do on test prompts, without and with an adapter.

    Args:
        recipe: names model, data and prompts.
        adapter: a run folder, an adapter folder, a hub id, or None.
        prompts: how many test prompts to look at; as many as there are where these are fewer.
        detectors: also score every head on repeated random tokens.
        on_stage: told what is opened or looked at.
        on_progress: told how many prompts of how many are done, random rows among them.

    Returns:
        State ``before`` and, with an adapter, ``after``.
    """
    adapter = None if adapter is None else adapters.find(adapter)
    experiment = prepare(recipe, adapter, on_stage=on_stage)
    (on_stage or _nothing)("looking at heads")
    return experiment.heads(
        experiment.test_prompts()[:prompts],
        detectors=detectors,
        adapter=None if adapter is None else adapter.name,
        on_progress=on_progress,
    )


def _nothing(what: str) -> None:
    del what


def _keep_last_good(
    experiment: Experiment, progress: Progress, folder: RunFolder, reason: str
) -> None:
    """Of a run that stopped: the adapter as its last finite update, or its best, left it."""
    if progress.updates > progress.skipped:
        adapters.save(experiment.loaded.model, folder.path, base_model=experiment.recipe.model)
    folder.write_run({**_facts(experiment), "stopped": reason})


def _keep_heads(
    experiment: Experiment,
    folder: RunFolder,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """What the heads did before and do now, for figures that need no model."""
    count = experiment.recipe.training.census_prompts
    if count:
        seen = experiment.heads(experiment.test_prompts()[:count], on_progress=on_progress)
        write_heads(folder.path / HEADS_FILE, seen)


def _facts(experiment: Experiment) -> dict[str, Any]:
    known = facts.of_run(
        experiment.recipe, experiment.loaded, experiment.task, experiment.trained_tasks
    )
    return known | ({"window": asdict(experiment.window)} if experiment.window else {})
