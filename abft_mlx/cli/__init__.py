"""The command line: ``abft-mlx demo | finetune | eval | predict | export | push | …``.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from abft_mlx.cli import (
    _bench,
    _demo,
    _doctor,
    _eval,
    _export,
    _finetune,
    _heads,
    _plot,
    _predict,
    _push,
    _recipes,
    _report,
    _study,
)
from abft_mlx.cli._shell import Commands

__all__ = ["app"]

app = typer.Typer(
    name="abft-mlx",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes take longer to draw than everything else that --help does
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(_demo.demo)
app.command("finetune")(_finetune.finetune)
app.command("eval")(_eval.evaluate)
app.command("predict")(_predict.predict)
app.command("heads")(_heads.heads)
app.command("plot")(_plot.plot)
app.command("study")(_study.study)
app.command("report")(_report.report)
app.command("export")(_export.export)
app.command("push")(_push.push)
app.add_typer(_recipes.app, name="recipes")
app.command("bench")(_bench.bench)
app.command("doctor")(_doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from abft_mlx import __version__

        typer.echo(f"abft-mlx {__version__}")
        raise typer.Exit


# Commands that run a model.
_LONG = ("demo", "finetune", "eval", "predict", "heads", "study", "export", "bench")


@app.callback()
def main(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Make a local language model a better few-shot classifier, by training its attention.

    Start with: abft-mlx demo
    """
    del version
    if ctx.invoked_subcommand in _LONG:
        from abft_mlx import runtime

        if slow := runtime.slow_blas():
            typer.echo(slow, err=True)
