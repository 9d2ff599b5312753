"""``abft-mlx finetune``: from a recipe, or from a model and a file, to an adapter."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft_mlx.cli import options, words
from abft_mlx.cli.progress import Board, BoardEvents, board, duration, size
from abft_mlx.cli.shell import Shell, join_ranks
from abft_mlx.errors import RunError, UsageError

if TYPE_CHECKING:
    from abft_mlx.events import Update
    from abft_mlx.experiment import Experiment, RunResult
    from abft_mlx.tracking import Tracking

# What the paper did (arXiv 2505.14233, section 4 and appendix A).
_PAPER: dict[str, Any] = {
    "prompt.selection": "random",
    "prompt.demonstrations": 4,
    "adapter.kind": "paper",
    "adapter.layers": None,
    "objective.kind": "abft",
    "training.learning_rate": None,
    "training.shared_demonstrations": 1,
    "training.examples": 512,
    "training.updates": 32,
    "training.prompts_per_update": 32,
    "training.validate_every": 0,
    "evaluation.demonstrations": "per_query",
    "evaluation.repeats": 2,
    "prediction.draws": 1,
    "prediction.calibration_texts": 0,
}


def finetune(
    recipe: str | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    output: Path | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    label_words: str | None = None,
    updates: int | None = None,
    learning_rate: float | None = None,
    demonstrations: str | None = None,
    seed: int | None = None,
    paper: bool = False,
    final: bool = False,
    settings: list[str] | None = None,
    resume: Path | None = None,
    report_to: str | None = None,
    project_name: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Train an adapter on labelled texts, and measure it.

    Either name a recipe, or give --model and --data and let the defaults do the rest.

    Args:
        output (DIR): The run folder. [default: runs/NAME-DATE-TIME]
        seed: training.seed: prompts, their order and lora_a. [min: 0] [default: 42]
        paper: As in the paper: ABFT on 4 random demonstrations, W_Q and W_K in full at 2e-5, or
            LoRA of rank 16 at 1e-4 above 10 billion parameters; measured in its way, too.
        final: Train on the test rows, too, once you have measured; there is no verdict then.
        resume (RUN): Continue the run in this folder; give nothing else then.
        report_to (TRACKERS): Report the run to wandb, swanlab or both (wandb,swanlab), by mlx-lm's
            callbacks.
        project_name: The project of --report-to's trackers. [default: abft-mlx]
    """
    base = {**(_PAPER if paper else {}), **({"data.holdout": "none"} if final else {})}
    changes = options.overrides(
        settings, base, model=model, data=data, text_column=text_column, label_column=label_column,
        labels=labels, label_words=label_words, updates=updates, learning_rate=learning_rate,
        demonstrations=demonstrations, training_seed=seed,
    )  # fmt: skip
    if resume is not None:
        if recipe or changes or output or overwrite:
            raise UsageError(
                "--resume takes everything from the run's own recipe.yaml: give no recipe, no "
                "--set and no other flag that changes it"
            )
    elif recipe is None and (model is None or data is None):
        missing = "--model" if model is None else "--data"
        raise UsageError(
            f"{missing} is missing: without a recipe both --model and --data are needed "
            "(abft-mlx recipes list shows the recipes)"
        )
    if project_name is not None and report_to is None:
        raise UsageError(f"--project-name {project_name!r} is for --report-to, which is not given")
    ranks = join_ranks(resumable=True)
    if not ranks.first:  # the first rank speaks for all
        as_json, quiet = False, True
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        tracking = None
        if report_to is not None and ranks.first:
            from abft_mlx import tracking as trackers

            chosen = trackers.chosen(report_to)
            tracking = trackers.Tracking(chosen, project_name or trackers.PROJECT, shell.tell)
        from abft_mlx import api, experiment, runtime

        runtime.use_wired_memory()
        if resume is not None:
            opened, folder = None, resume
        else:
            opened = options.open_recipe(recipe, changes)
            folder = output or api.default_output(opened)
        with (
            board(shell) as shown,
            Follow(shell, shown, folder, tracking, first=ranks.first) as follow,
        ):
            follow.begun = resume is not None
            result = experiment.finetune(
                opened,
                folder,
                overwrite=overwrite,
                events=follow,
                stop=follow.stop,
                ranks=ranks,
            )
        if not ranks.first:
            return
        shell.tell(*_outcome(result))
    document = _document(result)
    if tracking is not None:
        document["tracking"] = {
            "project": tracking.project,
            "trackers": list(tracking.names),
            "lost": tracking.lost,
        }
    shell.document(document)


class Follow(BoardEvents, contextlib.ExitStack):
    """Prints the plan of a run when it is ready, shows its updates, and reports them to trackers.

    While it is open a signal ends the run after the update that goes on.

    Attributes:
        begun: whether the run's folder holds a run that can be resumed.
        stop: what a signal asks to end the run.
    """

    def __init__(
        self,
        shell: Shell,
        shown: Board,
        output: Path,
        tracking: Tracking | None = None,
        *,
        first: bool = True,
    ) -> None:
        from abft_mlx import trainer

        contextlib.ExitStack.__init__(self)
        BoardEvents.__init__(self, shown)
        self._first = first
        self._shell = shell
        self._output = output
        self._tracking = tracking
        self.stop = trainer.Stop(shown.note)
        self.begun = False

    def __enter__(self) -> Follow:
        self.enter_context(self.stop.watching())
        self.push(self._interrupted)
        return self

    def prepared(self, experiment: Experiment, trainable: int) -> None:
        """Print the plan, open the trackers and have updates shown."""
        from abft_mlx.trainer import RunFolder

        self._board.clear()
        if self._shell.quiet and self._first:
            self._shell.tell(*(f"warning   {text}" for text in words.warnings(experiment)))
        self._shell.say(*words.plan(experiment, trainable, self._output))
        if self._tracking is not None:
            try:
                self._tracking.start(experiment.recipe, self._output)
            except RunError:
                folder = RunFolder(self._output)
                if not folder.has_checkpoint():  # not a run that goes on
                    folder.discard()
                raise
            self.push(self._close)
        self.begun = True
        self._board.training(experiment.recipe.training.updates)

    def update(self, update: Update) -> None:
        """Show and report one update."""
        super().update(update)
        if self._tracking is not None:
            self._tracking.updated(update)

    def _close(self, kind: type[BaseException] | None, *rest: object) -> None:
        """End the trackers' runs."""
        del rest
        assert self._tracking is not None
        self._tracking.close(failed=kind is not None)

    def _interrupted(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Say how to go on."""
        del rest
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._board.clear()
            if self.begun and self._first:
                resume = words.command("finetune", "--resume", self._output)
                self._shell.tell(f"to go on: {resume}")


def _outcome(result: RunResult) -> list[str]:
    """The result as lines for a person."""
    progress, recipe = result.progress, result.experiment.recipe
    lines = []
    if progress.updates:
        lines.append(
            f"done: {progress.updates} updates in {duration(progress.seconds)}, "
            f"peak memory {size(progress.peak_memory_bytes)}, "
            f"adapter {size(result.adapter_bytes)}"
        )
    validation = _validation(result)
    if validation and not progress.updates:
        lines.append(f"validation accuracy: {validation['after']:.1%}")
    elif validation:
        lines.append(
            f"validation accuracy: {validation['before']:.1%} before, "
            f"{validation['after']:.1%} after, {validation['best']:.1%} at best "
            f"(update {validation['best_update']})"
        )
        if validation["best_update"] == 0 and recipe.training.keep_best:
            read = recipe.objective.kind == "read_out"
            what = "the fitted head weights are kept" if read else "the adapter changes nothing"
            lines.append(f"no update did better on validation texts than none, so {what}")
    lines.append(f"adapter in {result.output}")
    if result.evaluation is not None:
        return [*lines, "", *words.verdict(result.evaluation)]
    if recipe.data.holdout == "none":
        return [*lines, f"next: {words.command('predict', result.output, 'FILE')}"]
    return [*lines, f"next: {words.command('eval', result.output)}"]


def _validation(result: RunResult) -> dict[str, Any] | None:
    """Accuracy on the validation rows, if there are any."""
    progress = result.progress
    if not progress.validations:
        return None
    return {
        "before": progress.validations[0][1],
        "after": progress.validations[-1][1],
        "best": progress.best_accuracy,
        "best_update": progress.best_update,
    }


def _document(result: RunResult) -> dict[str, Any]:
    """The JSON document."""
    experiment, progress = result.experiment, result.progress
    document: dict[str, Any] = {
        "schema": 1,
        "output": str(result.output),
        "model": experiment.recipe.model,
        "data": experiment.recipe.data.source,
        "labels": list(experiment.task.space.names),
        "label_words": list(experiment.task.space.words),
        "warnings": words.warnings(experiment),
        "trainable_parameters": result.trainable_parameters,
        "adapter_bytes": result.adapter_bytes,
        "updates": progress.updates,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "peak_memory_bytes": progress.peak_memory_bytes,
    }
    if experiment.window is not None:
        document["layers"] = experiment.window.layers
    validation = _validation(result)
    if validation:
        document["validation"] = validation
    return document | (result.evaluation or {})
