"""``abft-mlx export``: an adapter in another program's format, or merged into its base."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import options, progress, resolve, words
from abft_mlx.cli.options import (
    Data,
    Json,
    LabelColumn,
    Labels,
    Model,
    Overwrite,
    Quiet,
    Set,
    TextColumn,
)
from abft_mlx.cli.shell import Shell, alone
from abft_mlx.errors import DataError, UsageError

if TYPE_CHECKING:
    from abft_mlx.exchange import Comparison, Exported
    from abft_mlx.recipe import Recipe


class To(str, Enum):
    """The formats that an adapter is exported to."""

    mlx = "mlx"
    peft = "peft"
    fused = "fused"


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run folder, an adapter folder of mlx-lm or PEFT, or owner/name of the hub.",
        ),
    ],
    to: Annotated[
        To,
        typer.Option(
            help="mlx: an adapter of stock mlx-lm. peft: an adapter of PEFT. fused: a model of "
            "mlx-lm with the adapter merged in.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            parser=options.path,
            metavar="DIR",
            help="The folder to write.",
            show_default=False,
        ),
    ],
    model: Model = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Whose texts to measure with; its base, too, where RUN names none.",
            show_default="the run's own",
        ),
    ] = None,
    data: Data = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    labels: Labels = None,
    scale: Annotated[
        float,
        typer.Option(
            metavar="FACTOR",
            help="Multiplies the adapter's effect: 0.5 is half of it, 2 twice.",
        ),
    ] = 1.0,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="fused: all of a quantized base in floating point."),
    ] = False,
    float_merged: Annotated[
        bool,
        typer.Option(
            "--float-merged",
            help="fused: what the adapter changes in floating point, the rest quantized as it is.",
        ),
    ] = False,
    quantize: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help="fused: quantize to 2, 3, 4, 5, 6 or 8 bits; of a quantized base what the adapter "
            "changes, else everything.",
            show_default="as the base",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="HUB_ID",
            help="mlx, peft: the base's name in the adapter's configuration.",
            show_default="the model, if it is a hub id",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Test texts to measure the result on.")] = 64,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Compare the result with base + adapter."),
    ] = True,
    settings: Set = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another format, and measure what was written against base + adapter.

    A run folder needs nothing else: without its data, the result is measured on the run's own
    demonstrations. Another adapter needs --model, unless its configuration names the base, and
    --data or --recipe to be measured.
    """
    alone("export")
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        from abft_mlx import exchange, prediction, runtime

        runtime.use_wired_memory()
        folder = resolve.find_adapter(shell, run).folder
        revision = None
        if model is None and (recipe is not None or not _has_recipe(folder)):
            model, revision = _named_base(folder)
        changes = options.overrides(
            model=model,
            data=data,
            text_column=text_column,
            label_column=label_column,
            labels=labels,
            settings=settings,
        )
        if model is not None:
            # What a recipe says of its own base's history is not true of another.
            changes = [options.override("revision", revision), *changes]
        opened = _recipe(folder, recipe, model, data, changes, measure)
        precision = exchange.Precision(dequantize, float_merged, quantize)
        try:
            with progress.board(shell) as board:
                made = exchange.export(
                    folder,
                    to.value,
                    output,
                    model=opened.model,
                    revision=opened.revision,
                    recipe=opened if measure else None,
                    test_texts=data is not None or recipe is not None,
                    prompts=prompts,
                    scale=scale,
                    precision=precision,
                    base_model=base_model,
                    overwrite=overwrite,
                    on_stage=board.stage,
                    on_progress=board.count,
                )
        except DataError as error:
            raise DataError(f"{error}; or export with --no-measure", error.problems) from error
        _show(shell, made)
        if (folder / prediction.DEMONSTRATIONS_FILE).is_file():
            shell.say(f"prompt    {words.command('predict', run, '--show-prompt', 'TEXT')}")
    shell.document(_document(made, run, to.value, opened.model, scale))


def _has_recipe(run: Path) -> bool:
    return (run / "recipe.yaml").is_file()


def _named_base(run: Path) -> tuple[str | None, str | None]:
    """The base that a run's recipe or an adapter's own configuration names, and its revision."""
    from abft_mlx import adapters

    if _has_recipe(run):
        own = options.open_recipe(str(run / "recipe.yaml"), [])
        return own.model, own.revision
    return adapters.base_model(run), None


def _recipe(
    run: Path,
    recipe: str | None,
    model: str | None,
    data: str | None,
    changes: list[str],
    measure: bool,
) -> Recipe:
    """The recipe that names base and prompts; where nothing is measured the base is enough."""
    named = recipe or (str(run / "recipe.yaml") if _has_recipe(run) else None)
    if named is not None:
        return options.open_recipe(named, changes)
    if model is None:
        raise UsageError(f"{run} does not name its base model; give --model")
    if data is None and measure:
        raise UsageError(
            f"{run} has no recipe.yaml to take prompts from: give --data or --recipe to measure "
            "the result on, or --no-measure"
        )
    return options.open_recipe(None, changes)


def _show(shell: Shell, made: Exported) -> None:
    megabytes = sum(made.files.values()) / 1e6
    shell.tell(f"{len(made.files)} files, {megabytes:,.2f} MB in {made.folder}")
    if made.precision is not None:
        shell.say(f"weights   {made.precision}")
    if made.base_model is not None:
        shell.say(f"base      {made.base_model}")
    if made.comparison is not None:
        for line in _measured(made.comparison, made.measured_on):
            shell.say(line)
    for text in made.warnings:
        shell.tell(f"warning   {text}")


def _measured(found: Comparison, on: str | None) -> list[str]:
    lines = [f"measured  on {found.prompts} prompts, against base + adapter: {on}"]
    for name, one in (("written", found.result), ("base", found.base)):
        lines.append(
            f"  {name:8}logits differ by {one.vocabulary_mean:.2g} on average and "
            f"{one.vocabulary_max:.2g} at most, those of labels by {one.labels_mean:.2g} and "
            f"{one.labels_max:.2g}; same label in {one.agreement} of {found.prompts}"
        )
    if found.kept is None:
        lines.append("  the adapter has no effect on labels")
    else:
        lines.append(f"  {max(found.kept, 0.0):.1%} of the adapter's effect on labels is kept")
    return lines


def _document(made: Exported, run: str, to: str, model: str, scale: float) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": run,
        "to": to,
        "model": model,
        "scale": scale,
        "output": str(made.folder),
        "files": made.files,
        "bytes": sum(made.files.values()),
        "layers": made.layers,
        "base_model": made.base_model,
        "weights": made.precision,
        "measured": None if made.comparison is None else made.comparison.as_dict(),
        "measured_on": made.measured_on,
        "warnings": list(made.warnings),
    }
