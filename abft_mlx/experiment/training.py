"""From a recipe to a trained adapter: a run begun, or one that goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from abft_mlx import adapters, facts, files, prediction, runtime
from abft_mlx import recipe as recipes
from abft_mlx.errors import OutputError
from abft_mlx.experiment import head_weights, runs, shipping
from abft_mlx.experiment.opened import Experiment, prepare
from abft_mlx.induction import HEADS_FILE, Window, write_heads
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import (
    EVALUATION_FILE,
    DivergedError,
    Progress,
    RunFolder,
    Stop,
    Trainer,
    Update,
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
        evaluation: eval's JSON of the classifier on test rows, with its verdict; None where the
            recipe measures the paper's way, or there are no test rows.
    """

    experiment: Experiment
    progress: Progress
    output: Path
    trainable_parameters: int
    adapter_bytes: int
    evaluation: dict[str, Any] | None = None


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
    on_notice: Callable[[str], None] | None = None,
    stop: Stop | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Fine-tune the experiment's model and write its run folder.

    Args:
        experiment: from :func:`prepare`, without an adapter; its model is changed in place.
        output: the run folder.
        overwrite: replace a run that lies there.
        resume: go on from the checkpoint that lies there, or begin where none was written yet.
        on_prepared: told once, before training, of the experiment and its trainable parameters.
        on_update: told of every update.
        on_stage: told what is done before, between and after updates; "" where it is over.
        on_progress: told how many prompts of how many of such a stage are done.
        on_notice: told, in a line, what a person should know of, such as a damaged checkpoint; a
            warning where it is left out.
        stop: what may ask the run to end; it then saves a checkpoint and raises StoppedError.
        ranks: the processes that train together; the first one writes the folder.

    Raises:
        UsageError: something does not fit, or the folder cannot be used.
        RunError: the loss stopped being finite (the last good adapter is kept), the disk is full,
            or a rank is gone.
    """
    with contextlib.ExitStack() as hold:
        return _train(
            experiment,
            RunFolder(Path(output)),
            hold,
            overwrite=overwrite,
            resume=resume,
            on_prepared=on_prepared,
            on_update=on_update,
            on_stage=on_stage,
            on_progress=on_progress,
            on_notice=on_notice,
            stop=stop,
            ranks=ranks or Ranks(),
        )


def _train(
    experiment: Experiment,
    folder: RunFolder,
    hold: contextlib.ExitStack,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_prepared: Callable[[Experiment, int], None] | None,
    on_update: Callable[[Update], None] | None,
    on_stage: Callable[[str], None] | None,
    on_progress: Callable[[int, int], None] | None,
    on_notice: Callable[[str], None] | None,
    stop: Stop | None,
    ranks: Ranks,
) -> RunResult:
    """As :func:`train`; ``hold`` keeps the folder once it is needed."""
    model = experiment.loaded.model
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
    validate, validation_count = _validation(experiment, ranks, tell, on_progress)

    adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
    goes_on = resume and folder.has_checkpoint()
    if recipe.objective.kind == "read_out":
        if goes_on:
            head_weights.blank(experiment)
        else:
            tell("fitting head weights")
            head_weights.fit(experiment, training_prompts, on_progress)
    made_with = facts.made_with(recipe, experiment.loaded, experiment.trained_tasks)
    fingerprint = facts.digest(made_with)
    trainer = Trainer(
        model,
        training_prompts,
        recipe,
        folder=folder,
        validate=validate,
        on_update=on_update,
        fingerprint=fingerprint,
        made_with=made_with,
        on_notice=on_notice,
        stop=stop,
        ranks=ranks,
    )
    ranks.agree(f"{fingerprint} {goes_on}", "recipe, model, data, version or checkpoint")
    if ranks.first:
        if not goes_on:
            folder.check(overwrite=overwrite or resume)
        hold.enter_context(folder.held())
        if goes_on:
            folder.remove_leftovers()
        else:
            folder.create(overwrite=overwrite or resume, again=resume)
            folder.write_run(_facts(experiment))
            recipes.save(recipe, folder.recipe_path)
    trainable = adapters.trainable_parameters(model)
    if on_prepared is not None:
        on_prepared(experiment, trainable)
    try:
        progress = trainer.run(resume=goes_on)
    except DivergedError as error:
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
    tell("choosing demonstrations")
    predictor, chosen_accuracy = shipping.choose(experiment, on_progress=on_progress)
    prediction.write_demonstrations(folder.path, predictor)
    classifier = prediction.facts(predictor)
    if chosen_accuracy is not None:
        classifier["validation_accuracy"] = chosen_accuracy
    written = {
        **_facts(experiment),
        "finished": True,
        "totals": totals,
        "shift": adapters.shift_norms(model),
        "classifier": classifier,
    }
    if progress.validations:
        written["validation"] = {
            "prompts": validation_count,
            "before": progress.validations[0][1],
            "after": progress.validations[-1][1],
            "best": progress.best_accuracy,
            "best_update": progress.best_update,
            "kept_update": progress.best_update if recipe.training.keep_best else progress.updates,
        }
    folder.write_run(written)
    measured = None
    if recipe.evaluation.demonstrations == "classifier" and len(experiment.splits.test):
        measured = runs.evaluate_classifier(
            experiment, predictor, folder.path, on_stage=tell, on_progress=on_progress
        )
        files.write_json(folder.path / EVALUATION_FILE, measured)
    ranks.wait()
    return RunResult(experiment, progress, folder.path, trainable, adapter_bytes, measured)


def _validation(
    experiment: Experiment,
    ranks: Ranks,
    tell: Callable[[str], None],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Callable[[], float] | None, int]:
    """What gives the accuracy on validation texts, and how many prompts that takes."""
    training = experiment.recipe.training
    if not training.validate_every:
        return None, 0
    if experiment.recipe.evaluation.demonstrations == "classifier":
        count = min(len(experiment.splits.validation), training.validation_prompts)

        def ask() -> float | None:
            return shipping.choose(experiment, draws=1)[1]

    else:
        validation = experiment.validation_prompts()
        count = len(validation)

        def ask() -> float | None:
            return experiment.accuracy(validation, ranks, on_progress)

    def validate() -> float:
        tell("validation")
        accuracy = ask()
        tell("")
        assert accuracy is not None
        return accuracy

    return (validate, count) if count else (None, 0)


def finetune(
    recipe: recipes.Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    on_prepared: Callable[[Experiment, int], None] | None = None,
    on_update: Callable[[Update], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    stop: Stop | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Run a recipe: open what it names, fine-tune, write the run folder.

    Args:
        recipe: the run.
        output: the run folder.
        overwrite: replace a run that lies there.
        on_prepared: told once, before training, of the experiment and its trainable parameters.
        on_update: told of every update.
        on_stage: told what is opened, and what is done before, between and after updates.
        on_progress: told how many prompts of how many of such a stage are done.
        on_notice: told, in a line, what a person should know of.
        stop: what may ask the run to end; it then saves a checkpoint and raises StoppedError.
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
        on_notice=on_notice,
        stop=stop,
        ranks=ranks,
    )


def resume(
    output: str | Path,
    *,
    on_prepared: Callable[[Experiment, int], None] | None = None,
    on_update: Callable[[Update], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    stop: Stop | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Continue the run in a folder from its checkpoint, with the recipe that lies there.

    A run that was ended before its first checkpoint begins again, with the same recipe.
    """
    ranks, folder = ranks or Ranks(), RunFolder(Path(output))
    folder.read_run()
    if not folder.recipe_path.is_file():
        raise OutputError(f"{folder.path}: no run had begun (no recipe.yaml); start it anew")
    with contextlib.ExitStack() as hold:
        if ranks.first:
            hold.enter_context(folder.held())
        recipe = recipes.load(str(folder.recipe_path))
        return _train(
            prepare(recipe, processes=ranks.size, on_stage=on_stage),
            folder,
            hold,
            resume=True,
            on_prepared=on_prepared,
            on_update=on_update,
            on_stage=on_stage,
            on_progress=on_progress,
            on_notice=on_notice,
            stop=stop,
            ranks=ranks,
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
        chosen = (
            experiment.test_prompts(count)
            if len(experiment.splits.test)
            else experiment.training_prompts()
        )
        seen = experiment.heads(chosen[:count], on_progress=on_progress)
        write_heads(folder.path / HEADS_FILE, seen)


def _facts(experiment: Experiment) -> dict[str, Any]:
    known = facts.of_run(
        experiment.recipe, experiment.loaded, experiment.task, experiment.trained_tasks
    )
    return known | ({"window": asdict(experiment.window)} if experiment.window else {})
