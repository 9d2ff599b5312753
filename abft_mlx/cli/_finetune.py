"""``abft-mlx finetune``: from a recipe, or from a model and a file, to an adapter."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import _options, _progress, _ranks, _report
from abft_mlx.cli._options import (
    Data,
    Json,
    LabelColumn,
    Labels,
    Model,
    Overwrite,
    Quiet,
    RecipeName,
    Set,
    TextColumn,
)
from abft_mlx.cli._shell import Shell
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from abft_mlx.experiment import Experiment, RunResult
    from abft_mlx.ranks import Ranks
    from abft_mlx.trainer import Update

_EXACT = ("training.gradient=exact", "training.shared_demonstrations=1")
# People's labels are rarely one token, so a run without a recipe lets abft-mlx choose words.
_WITHOUT_RECIPE = ("prompt.label_words=auto",)


def finetune(
    recipe: RecipeName = None,
    model: Model = None,
    data: Data = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run folder.",
            show_default="runs/NAME-DATE-TIME",
        ),
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    labels: Labels = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="training.seed: prompts, their order and lora_a.",
            show_default="42",
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Every prompt with its own demonstrations, and exact gradients, as in the paper.",
        ),
    ] = False,
    settings: Set = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Continue the run in this folder; nothing else is given then."
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model's attention on labelled texts; write an adapter.

    Either name a recipe, or give --model and --data and let the defaults do the rest.
    """
    changes = _options.overrides(
        model=model,
        data=data,
        text_column=text_column,
        label_column=label_column,
        labels=labels,
        settings=[*(_EXACT if exact else ()), *(settings or ())],
        training=seed,
    )
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
    elif recipe is None:
        changes = [*_WITHOUT_RECIPE, *changes]
    ranks = _ranks.join(resumable=True)
    if not ranks.first:  # the first rank speaks for all
        as_json, quiet = False, True
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        result = _run(shell, ranks, recipe, changes, output, resume, overwrite=overwrite)
        if not ranks.first:
            return
        for line in _outcome(result):
            shell.tell(line)
    shell.document(_document(result))


def _run(
    shell: Shell,
    ranks: Ranks,
    recipe: str | None,
    changes: list[str],
    output: Path | None,
    resume: Path | None,
    *,
    overwrite: bool,
) -> RunResult:
    from abft_mlx import api, experiment, runtime

    runtime.use_wired_memory()
    if resume is not None:
        folder = resume
    else:
        opened = _options.open_recipe(recipe, changes)
        folder = output or api.default_output(opened)
    shell.say("opening model and data …")
    try:
        with Follow(shell, folder) as follow:
            if resume is not None:
                return experiment.resume(
                    folder, on_prepared=follow.prepared, on_update=follow.updated, ranks=ranks
                )
            return experiment.finetune(
                opened,
                folder,
                overwrite=overwrite,
                on_prepared=follow.prepared,
                on_update=follow.updated,
                ranks=ranks,
            )
    except KeyboardInterrupt:
        if ranks.first and (folder / "checkpoint").is_dir():
            shell.tell(f"to go on: {_report.command('finetune', '--resume', folder)}")
        raise


class Follow(contextlib.ExitStack):
    """Prints the plan of a run when it is ready, then shows its updates."""

    def __init__(self, shell: Shell, output: Path) -> None:
        super().__init__()
        self._shell = shell
        self._output = output
        self._display: _progress.Display | None = None

    def prepared(self, experiment: Experiment, trainable: int) -> None:
        """Print the plan and start the display."""
        self._shell.say(*_report.plan(experiment, trainable, self._output))
        updates = experiment.recipe.training.updates
        self._display = self.enter_context(_progress.updates(self._shell, updates))

    def updated(self, update: Update) -> None:
        """Show one update."""
        if self._display is not None:
            self._display.update(update)


def _outcome(result: RunResult) -> list[str]:
    progress = result.progress
    lines = [
        f"done: {progress.updates} updates in {_progress.duration(progress.seconds)}, "
        f"peak memory {_progress.size(progress.peak_memory_bytes)}, "
        f"adapter {_progress.size(result.adapter_bytes)}"
    ]
    validation = _validation(result)
    if validation:
        lines.append(
            f"validation accuracy: {validation['before']:.1%} before, "
            f"{validation['after']:.1%} after, {validation['best']:.1%} at best "
            f"(update {validation['best_update']})"
        )
        if validation["best_update"] == 0 and result.experiment.recipe.training.keep_best:
            lines.append("no update did better than none, so the adapter kept changes nothing")
    lines.append(f"adapter in {result.output}; mlx-lm loads it with --adapter-path")
    lines.append(f"next: {_report.command('eval', '--adapter', result.output)}")
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
        "labels": dict(zip(experiment.space.names, experiment.space.words, strict=True)),
        "warnings": _report.warnings(experiment),
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
    return document
