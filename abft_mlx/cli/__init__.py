"""The command line: ``abft-mlx demo | finetune | eval | predict | export | push | …``.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from abft_mlx.cli import (
    bench,
    demo,
    doctor,
    eval,
    export,
    finetune,
    heads,
    plot,
    predict,
    recipes,
    study,
)
from abft_mlx.cli.options import documented
from abft_mlx.cli.shell import Command, Commands

__all__ = ["app"]

app = typer.Typer(
    name="abft-mlx",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes take longer to draw than everything else that --help does
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The commands in the parts of the help, each with two things to type first.
_USE, _LOOK, _SHARE, _RESEARCH, _CHECK = "Use", "Look", "Share", "Research", "Check"
_COMMANDS = (
    (_USE, "demo", demo.demo, "demo", "demo -o runs/demo --seed 7"),
    (
        _USE, "finetune", finetune.finetune,
        "finetune -m Qwen/Qwen2.5-0.5B-Instruct -d mails.csv -o runs/mails", "finetune trec",
    ),
    (_USE, "eval", eval.evaluate, "eval runs/mails", "eval sst2 -m models/smollm2"),
    (
        _USE, "predict", predict.predict,
        "predict runs/mails new.csv -o labels.csv", "predict runs/mails < new.txt",
    ),
    (
        _LOOK, "heads", heads.heads,
        "heads runs/mails", "heads models/smollm2 -d mails.csv -o heads.csv",
    ),
    (_LOOK, "plot", plot.plot, "plot runs/mails", "plot runs/mails --list"),
    (_LOOK, "report", plot.report, "report runs/mails", "report studies/small -o small.html"),
    (
        _SHARE, "export", export.export,
        "export runs/mails --to fused -o models/mails", "export runs/mails --to peft -o peft/mails",
    ),
    (_SHARE, "push", export.push, "push runs/mails me/mails --dry-run", "push runs/mails me/mails"),
    (_RESEARCH, "study", study.study, "study small -o studies/small", "study mine.yaml --list"),
    (_RESEARCH, "bench", bench.bench, "bench", "bench --size 12x768x32000:8x160k4"),
    (_CHECK, "doctor", doctor.doctor, "doctor", "doctor -m models/smollm2"),
)  # fmt: skip
for _part, _name, _function, *_examples in _COMMANDS:
    # The mark before the lines keeps them as they are.
    _lines = "\n".join(f"  abft-mlx {line}" for line in _examples)
    app.command(_name, cls=Command, epilog=f"\b\nExamples:\n{_lines}")(documented(_function))
app.add_typer(recipes.app, name="recipes")
Commands.parts = {
    part: [name for other, name, *_ in _COMMANDS if other == part]
    for part in (_USE, _LOOK, _SHARE, _RESEARCH, _CHECK)
}
Commands.parts[_CHECK].append("recipes")

# Commands that run a model.
_LONG = ("demo", "finetune", "eval", "predict", "heads", "study", "export", "bench")


def _print_version(wanted: bool) -> None:
    """The callback of --version."""
    if wanted:
        from abft_mlx import __version__

        typer.echo(f"abft-mlx {__version__}")
        raise typer.Exit


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
