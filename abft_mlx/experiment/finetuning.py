"""From a recipe to a trained adapter: one function for a new run and for one that goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abft_mlx import adapters, attention, facts, files, ports, prediction, prefix, read_out, runtime
from abft_mlx import recipe as recipes
from abft_mlx.events import Events
from abft_mlx.experiment import measuring
from abft_mlx.experiment.opened import Experiment, prepare
from abft_mlx.induction import HEADS_FILE, Window, write_heads
from abft_mlx.prompts import Prompt, Prompts
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import (
    EVALUATION_FILE,
    DivergedError,
    Progress,
    RunFolder,
    Stop,
    Trainer,
    batches,
)

# Enough for a mean number of heads in every layer.
WINDOW_PROMPTS = 32


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
        classifier: how the run predicts, as ``run.json`` has it; None on a rank that did not
            write it.
    """

    experiment: Experiment
    progress: Progress
    output: Path
    trainable_parameters: int
    adapter_bytes: int
    evaluation: dict[str, Any] | None = None
    classifier: dict[str, Any] | None = None


def finetune(
    run: recipes.Recipe | Experiment | None,
    output: str | Path,
    *,
    overwrite: bool = False,
    events: Events | None = None,
    stop: Stop | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Fine-tune, write the run folder, and measure the classifier.

    Args:
        run: a recipe, or an experiment that `prepare` opened without an adapter, whose model is
            changed in place. None continues the run in the folder from its checkpoint, with the
            recipe that lies there; one that ended before its first checkpoint begins again.
        output: the run folder.
        overwrite: replace a run that lies there.
        events: who hears of the plan, the stages, the prompts and the updates.
        stop: what may ask the run to end; it then saves a checkpoint and raises StoppedError.
        ranks: the processes that train together; the first one writes the folder.

    Raises:
        UsageError: something does not fit, or the folder cannot be used.
        RunError: the loss stopped being finite (the last good adapter is kept), the disk is full,
            or a rank is gone.
    """
    events, ranks, folder = events or Events(), ranks or Ranks(), RunFolder(Path(output))
    with contextlib.ExitStack() as hold:
        if ranks.first:
            hold.enter_context(folder.opened(overwrite=overwrite, resume=run is None))
        if isinstance(run, Experiment):
            experiment = run
        elif run is not None:
            experiment = prepare(run, processes=ranks.size, events=events)
        else:
            before, recipe = folder.read_begun()
            experiment = prepare(recipe, processes=ranks.size, events=events)
            # The window that the census of an earlier start of this run chose.
            window = Window(**before["window"]) if before.get("window") else None
            experiment = replace(experiment, window=window)
        resume = run is None and folder.has_checkpoint()
        validation, validate = _validation(experiment, events, ranks)
        experiment, prompts = _attached(experiment, events, blank=resume)
        recipe, model, task = experiment.recipe, experiment.loaded.model, experiment.task
        made_with = facts.made_with(recipe, experiment.loaded, experiment.trained_tasks)
        fingerprint = facts.digest(made_with)
        trainer = Trainer(
            model,
            prompts,
            recipe,
            folder=folder,
            validate=validate,
            events=events,
            fingerprint=fingerprint,
            made_with=made_with,
            stop=stop,
            ranks=ranks,
        )
        ranks.agree(f"{fingerprint} {resume}", "recipe, model, data, version or checkpoint")
        document = facts.of_run(recipe, experiment.loaded, task, experiment.trained_tasks)
        if experiment.window:
            document["window"] = asdict(experiment.window)
        if ranks.first and not resume:
            folder.create(keep=run is None)
            folder.write_run(document)
            recipes.save(recipe, folder.recipe_path)
        trainable = adapters.trainable_parameters(model)
        events.prepared(experiment, trainable)
        try:
            progress = trainer.run(resume=resume)
        except DivergedError as error:
            if ranks.first:
                done = trainer.progress
                if done.updates > done.skipped:
                    adapters.save(model, folder.path, base_model=recipe.model)
                folder.write_run({**document, "stopped": str(error)})
            raise
        adapter_bytes, measured, classifier = 0, None, None
        if ranks.first:
            events.stage("choosing demonstrations")
            predictor, accuracies = measuring.choose_trained(experiment, events)
            adapters.save(model, folder.path, base_model=recipe.model)
            adapter_bytes = (folder.path / "adapters.safetensors").stat().st_size
            document |= {
                "shortened_texts": facts.shortened_texts([task, *experiment.trained_tasks]),
                "finished": True,
                "totals": _totals(trainer, adapter_bytes),
                "shift": adapters.shift_norms(model),
            }
            if progress.validations:
                keeps_best = recipe.training.keep_best
                document["validation"] = {
                    "prompts": validation,
                    "before": progress.validations[0][1],
                    "after": progress.validations[-1][1],
                    "best": progress.best_accuracy,
                    "best_update": progress.best_update,
                    "kept_update": progress.best_update if keeps_best else progress.updates,
                }
            shipped = prediction.write(folder.path, predictor)
            document["classifier"] = shipped | accuracies
            classifier = document["classifier"]
            measured = _ship(experiment, predictor, folder, document, events)
        ranks.wait()
    return RunResult(
        experiment, progress, folder.path, trainable, adapter_bytes, measured, classifier
    )


def fit(experiment: Experiment, events: Events | None = None) -> tuple[Experiment, Progress]:
    """Fine-tune the experiment's model in place, as `finetune` does, without a run folder.

    Args:
        experiment: from `open_texts`, without an adapter.
        events: who hears of every update.

    Returns:
        The experiment with the layers that trained in its recipe, and what the run came to.

    Raises:
        UsageError: something does not fit.
        RunError: the loss stopped being finite, or memory does not suffice.
    """
    events = events or Events()
    experiment, prompts = _attached(experiment, events)
    has_validation = len(experiment.task.splits.validation) > 0
    trainer = Trainer(
        experiment.loaded.model,
        prompts,
        experiment.recipe,
        validate=(lambda: measuring.validated(experiment)) if has_validation else None,
        events=events,
    )
    return experiment, trainer.run()


def _attached(
    experiment: Experiment, events: Events, *, blank: bool = False
) -> tuple[Experiment, Prompts]:
    """Put the adapter, and a read-out where one is trained, on the model.

    With ``blank`` a checkpoint will fill the head weights, and they are not fitted.
    """
    model, prompts = experiment.loaded.model, experiment.training_prompts()
    if experiment.recipe.adapter.layers == "auto":
        events.stage("looking for layers with induction heads")
        window = Window.of(experiment.census(prompts[:WINDOW_PROMPTS], events))
        adapter = experiment.recipe.adapter.model_copy(update={"layers": window.layers})
        recipe = experiment.recipe.model_copy(update={"adapter": adapter})
        experiment = replace(experiment, recipe=recipe, window=window)
    recipe = experiment.recipe
    adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
    if recipe.objective.kind == "read_out" and blank:
        counts = ports.head_counts(model)
        read_out.attach(model, {layer: np.zeros(count) for layer, count in counts.items()})
    elif recipe.objective.kind == "read_out":
        events.stage("fitting head weights")
        _fit_head_weights(experiment, prompts, events)
    return experiment, prompts


def _fit_head_weights(experiment: Experiment, prompts: Sequence[Prompt], events: Events) -> None:
    """Put a read-out on the model, fitted on the first training prompts by the model as it is."""
    model, recipe = experiment.loaded.model, experiment.recipe
    m = recipe.training.together
    prompts = prompts[: max(m, recipe.objective.fit_prompts // m * m)]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    limit = runtime.batch_tokens(recipe.evaluation.batch_tokens) // longest
    classes = 1 + max(max((prompt.gold, *prompt.demonstration_labels)) for prompt in prompts)
    features, gold, groups = [], [], []
    done = 0
    share = prefix.shareable(model)
    for batch in batches.micro_batches(prompts, limit, together=m, bucket_tokens=1, share=share):
        arrays = batch.arrays()
        tokens, last = arrays["tokens"], arrays["last"]
        if batch.prefix is None:
            rows = attention.forward(model, tokens, last)[1]
        else:
            last = last - batch.prefix.shape[1]
            rows = prefix.forward(model, arrays["prefix"], tokens, last)[1]
        labels = (arrays["label_positions"], arrays["demonstration_labels"])
        features.append(np.array(read_out.features_of(rows, *labels, classes)))
        gold.append(batch.batch.gold)
        groups.append((done + np.arange(len(batch.batch))) // m)
        done += batch.prompts
        events.progress(done, len(prompts))
    weights = read_out.fit(np.concatenate(features), np.concatenate(gold), np.concatenate(groups))
    read_out.attach(model, read_out.by_layer(weights, ports.head_counts(model)))
    mx.eval(model.trainable_parameters())


def _validation(
    experiment: Experiment, events: Events, ranks: Ranks
) -> tuple[int, Callable[[], float] | None]:
    """How many prompts a validation takes, and what gives its accuracy; 0 and None for none."""
    training = experiment.recipe.training
    if not training.validate_every:
        return 0, None
    classifier = experiment.recipe.evaluation.demonstrations == "classifier"
    prompts = [] if classifier else list(experiment.validation_prompts())
    count = len(prompts)
    if classifier:
        count = min(len(experiment.task.splits.validation), training.validation_prompts)

    def validate() -> float:
        events.stage("validation")
        if classifier:
            accuracy = measuring.validated(experiment)
        else:
            accuracy = experiment.measure(prompts, events, ranks)["accuracy"]
        events.stage("")
        return accuracy

    return (count, validate) if count else (0, None)


def _totals(trainer: Trainer, adapter_bytes: int) -> dict[str, Any]:
    """``totals`` of run.json."""
    progress = trainer.progress
    totals = {
        "updates": progress.updates,
        "seen_examples": progress.updates * trainer.recipe.training.prompts_per_update,
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
    if trainer.ranks.size > 1:
        totals["processes"] = trainer.ranks.size
    return totals


def _ship(
    experiment: Experiment,
    predictor: prediction.Predictor,
    folder: RunFolder,
    document: dict[str, Any],
    events: Events,
) -> dict[str, Any] | None:
    """Complete the folder with heads, run.json and the measured classifier."""
    recipe, splits = experiment.recipe, experiment.task.splits
    count = recipe.training.census_prompts
    if count:
        events.stage("looking at heads")
        tested = len(splits.test) > 0
        prompts = experiment.test_prompts() if tested else experiment.training_prompts()
        write_heads(folder.path / HEADS_FILE, experiment.heads(prompts[:count], events=events))
    folder.write_run(document)
    if recipe.evaluation.demonstrations != "classifier" or not len(splits.test):
        return None
    measured = measuring.evaluate_classifier(experiment, predictor, folder.path, events=events)
    files.write_json(folder.path / EVALUATION_FILE, measured)
    return measured
