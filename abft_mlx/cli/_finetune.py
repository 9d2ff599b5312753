"""``abft-mlx finetune``: from a recipe, or from a model and a file, to an adapter."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import _options, _progress, _ranks, _words
from abft_mlx.cli._events import BoardEvents
from abft_mlx.cli._options import (
    Data,
    Demonstrations,
    Json,
    LabelColumn,
    Labels,
    LabelWords,
    LearningRate,
    Model,
    Overwrite,
    Quiet,
    RecipeName,
    Set,
    TextColumn,
    Updates,
)
from abft_mlx.cli._shell import Shell
from abft_mlx.errors import RunError, UsageError

if TYPE_CHECKING:
    from abft_mlx.events import Update
    from abft_mlx.experiment import Experiment, RunResult
    from abft_mlx.ranks import Ranks
    from abft_mlx.tracking import Tracking

# What the paper did (arXiv 2505.14233, section 4 and appendix A).
_PAPER = (
    "prompt.selection=random",
    "prompt.demonstrations=4",
    "adapter.kind=paper",
    "adapter.layers=null",
    "objective.kind=abft",
    "training.learning_rate=null",
    "training.gradient=exact",
    "training.shared_demonstrations=1",
    "training.examples=512",
    "training.updates=32",
    "training.prompts_per_update=32",
    "training.validate_every=0",
    "evaluation.demonstrations=per_query",
    "evaluation.repeats=2",
    "prediction.draws=1",
    "prediction.calibration_texts=0",
)


def finetune(
    recipe: RecipeName = None,
    model: Model = None,
    data: Data = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=_options.path,
            metavar="DIR",
            help="The run folder.",
            show_default="runs/NAME-DATE-TIME",
        ),
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    labels: Labels = None,
    label_words: LabelWords = None,
    updates: Updates = None,
    learning_rate: LearningRate = None,
    demonstrations: Demonstrations = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="training.seed: prompts, their order and lora_a.",
            show_default="42",
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="As in the paper: ABFT on 4 random demonstrations, W_Q and W_K in full at 2e-5, "
            "or LoRA of rank 16 at 1e-4 above 10 billion parameters; measured in its way, too.",
        ),
    ] = False,
    final: Annotated[
        bool,
        typer.Option(
            "--final",
            help="Train on the test rows, too, once you have measured; there is no verdict then.",
        ),
    ] = False,
    settings: Set = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Continue the run in this folder; nothing else is given then."
        ),
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKERS",
            help="Report the run to wandb, swanlab or both (wandb,swanlab), by mlx-lm's callbacks.",
            show_default=False,
        ),
    ] = None,
    project_name: Annotated[
        str | None,
        typer.Option(help="What --report-to's trackers call the project.", show_default="abft-mlx"),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on labelled texts; write an adapter, measure it, and judge it.

    Either name a recipe, or give --model and --data and let the defaults do the rest.

    Example: abft-mlx finetune --model M --data mails.csv --output runs/mails
    """
    changes = _options.overrides(
        model=model,
        data=data,
        text_column=text_column,
        label_column=label_column,
        labels=labels,
        label_words=label_words,
        updates=updates,
        learning_rate=learning_rate,
        demonstrations=demonstrations,
        settings=settings,
        training=seed,
    )
    if final:
        changes = ["data.holdout=none", *changes]
    if paper:
        changes = [*_PAPER, *changes]
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
    ranks = _ranks.join(resumable=True)
    if not ranks.first:  # the first rank speaks for all
        as_json, quiet = False, True
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        tracking = _tracking(shell, report_to, project_name) if ranks.first else None
        result = _run(shell, ranks, recipe, changes, output, resume, tracking, overwrite=overwrite)
        if not ranks.first:
            return
        for line in _outcome(result):
            shell.tell(line)
    document = _document(result)
    if tracking is not None:
        document["tracking"] = {
            "project": tracking.project,
            "trackers": list(tracking.names),
            "lost": tracking.lost,
        }
    shell.document(document)


def _tracking(shell: Shell, report_to: str | None, project: str | None) -> Tracking | None:
    """The trackers asked for, found before anything is opened."""
    if report_to is None:
        return None
    from abft_mlx import tracking

    return tracking.Tracking(tracking.chosen(report_to), project or tracking.PROJECT, shell.tell)


def _run(
    shell: Shell,
    ranks: Ranks,
    recipe: str | None,
    changes: list[str],
    output: Path | None,
    resume: Path | None,
    tracking: Tracking | None,
    *,
    overwrite: bool,
) -> RunResult:
    from abft_mlx import api, experiment, runtime, trainer

    runtime.use_wired_memory()
    if resume is not None:
        opened, folder = None, resume
    else:
        opened = _options.open_recipe(recipe, changes)
        folder = output or api.default_output(opened)
    with (
        _progress.board(shell) as board,
        trainer.Stop(board.note).watching() as stop,
        Follow(shell, board, folder, tracking) as follow,
    ):
        try:
            return experiment.finetune(
                opened, folder, overwrite=overwrite, events=follow, stop=stop, ranks=ranks
            )
        except KeyboardInterrupt:
            board.clear()
            if ranks.first and (resume is not None or follow.begun):
                shell.tell(f"to go on: {_words.command('finetune', '--resume', folder)}")
            raise


class Follow(BoardEvents, contextlib.ExitStack):
    """Prints the plan of a run when it is ready, then shows its updates and reports them.

    Attributes:
        begun: whether the run's folder holds what it can go on from.
    """

    def __init__(
        self,
        shell: Shell,
        board: _progress.Board,
        output: Path,
        tracking: Tracking | None = None,
    ) -> None:
        contextlib.ExitStack.__init__(self)
        BoardEvents.__init__(self, board)
        self._shell = shell
        self._output = output
        self._tracking = tracking
        self.begun = False

    def prepared(self, experiment: Experiment, trainable: int) -> None:
        """Print the plan, open the trackers and have updates shown."""
        from abft_mlx.trainer import RunFolder

        self._board.clear()
        self._shell.say(*_words.plan(experiment, trainable, self._output))
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
        training = experiment.recipe.training
        self._board.training(training.updates, training.validate_every)

    def update(self, update: Update) -> None:
        """Show and report one update."""
        super().update(update)
        if self._tracking is not None:
            self._tracking.updated(update)

    def _close(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        assert self._tracking is not None
        self._tracking.close(failed=kind is not None)


def _outcome(result: RunResult) -> list[str]:
    progress = result.progress
    lines = []
    if progress.updates:
        lines.append(
            f"done: {progress.updates} updates in {_progress.duration(progress.seconds)}, "
            f"peak memory {_progress.size(progress.peak_memory_bytes)}, "
            f"adapter {_progress.size(result.adapter_bytes)}"
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
        if validation["best_update"] == 0 and result.experiment.recipe.training.keep_best:
            read = result.experiment.recipe.objective.kind == "read_out"
            what = "the fitted head weights are kept" if read else "the adapter changes nothing"
            lines.append(f"no update did better on validation texts than none, so {what}")
    lines.append(f"adapter in {result.output}")
    if result.evaluation is not None:
        lines += ["", *_words.verdict(result.evaluation)]
    elif result.experiment.recipe.data.holdout == "none":
        lines.append(f"next: {_words.command('predict', result.output, 'FILE')}")
    else:
        lines.append(f"next: {_words.command('eval', result.output)}")
    return lines


def _validation(result: RunResult) -> dict[str, Any] | None:
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
    experiment, progress = result.experiment, result.progress
    document: dict[str, Any] = {
        "schema": 1,
        "output": str(result.output),
        "model": experiment.recipe.model,
        "data": experiment.recipe.data.source,
        "labels": list(experiment.task.space.names),
        "label_words": list(experiment.task.space.words),
        "warnings": _words.warnings(experiment),
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
