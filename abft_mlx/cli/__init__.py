"""The command line: ``abft-mlx demo | finetune | eval | predict | export | push | …``.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    push,
    recipes,
    report,
    study,
)
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
# Each with what somebody would type first.
COMMANDS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "demo": (demo.demo, ("demo",)),
    "finetune": (
        finetune.finetune,
        (
            "finetune --model Qwen/Qwen2.5-0.5B-Instruct --data mails.csv --output runs/mails",
            "finetune trec",
        ),
    ),
    "eval": (eval.evaluate, ("eval runs/mails", "eval sst2 --model models/smollm2")),
    "predict": (
        predict.predict,
        (
            "predict runs/mails new.csv --output labels.csv",
            "cat new.txt | abft-mlx predict runs/mails",
        ),
    ),
    "heads": (
        heads.heads,
        ("heads runs/mails", "heads models/smollm2 --data mails.csv --output heads.csv"),
    ),
    "plot": (plot.plot, ("plot runs/mails", "plot runs/mails --list")),
    "study": (study.study, ("study small --output studies/small",)),
    "report": (report.report, ("report runs/mails",)),
    "export": (
        export.export,
        (
            "export runs/mails --to fused --output models/mails",
            "export runs/mails --to peft --output peft/mails",
        ),
    ),
    "push": (push.push, ("push runs/mails me/mails --dry-run",)),
    "bench": (bench.bench, ("bench --quick",)),
    "doctor": (doctor.doctor, ("doctor", "doctor --model models/smollm2")),
}


def _examples(lines: Sequence[str]) -> str:
    """The end of a command's help; the mark before it keeps its lines as they are."""
    shown = (one if " abft-mlx " in one else f"abft-mlx {one}" for one in lines)
    return "\b\nExamples:\n" + "\n".join(f"  {one}" for one in shown)


for _name, (_function, _lines) in COMMANDS.items():
    app.command(_name, cls=Command, epilog=_examples(_lines))(_function)
app.add_typer(recipes.app, name="recipes")


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
