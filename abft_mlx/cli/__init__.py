"""The command line: ``abft-mlx demo | finetune | eval | predict | export | push | …``.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
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
COMMANDS: dict[str, dict[str, tuple[Callable[..., None] | None, tuple[str, ...]]]] = {
    "Use": {
        "demo": (demo.demo, ("demo", "demo -o runs/demo --seed 7")),
        "finetune": (
            finetune.finetune,
            ("finetune -m Qwen/Qwen2.5-0.5B-Instruct -d mails.csv -o runs/mails", "finetune trec"),
        ),
        "eval": (eval.evaluate, ("eval runs/mails", "eval sst2 -m models/smollm2")),
        "predict": (
            predict.predict,
            ("predict runs/mails new.csv -o labels.csv", "predict runs/mails < new.txt"),
        ),
    },
    "Look": {
        "heads": (
            heads.heads,
            ("heads runs/mails", "heads models/smollm2 -d mails.csv -o heads.csv"),
        ),
        "plot": (plot.plot, ("plot runs/mails", "plot runs/mails --list")),
        "report": (plot.report, ("report runs/mails", "report studies/small -o small.html")),
    },
    "Share": {
        "export": (
            export.export,
            (
                "export runs/mails --to fused -o models/mails",
                "export runs/mails --to peft -o peft/mails",
            ),
        ),
        "push": (export.push, ("push runs/mails me/mails --dry-run", "push runs/mails me/mails")),
    },
    "Research": {
        "study": (study.study, ("study small -o studies/small", "study mine.yaml --list")),
        "bench": (bench.bench, ("bench", "bench --size 12x768x32000:8x160k4")),
    },
    "Check": {
        "doctor": (doctor.doctor, ("doctor", "doctor -m models/smollm2")),
        "recipes": (None, ()),
    },
}
Commands.parts = {part: tuple(commands) for part, commands in COMMANDS.items()}
for _commands in COMMANDS.values():
    for _name, (_function, _lines) in _commands.items():
        if _function is not None:
            # The mark before the lines keeps them as they are.
            _examples = "\n".join(f"  abft-mlx {line}" for line in _lines)
            app.command(_name, cls=Command, epilog=f"\b\nExamples:\n{_examples}")(
                documented(_function)
            )
app.add_typer(recipes.app, name="recipes")


def _print_version(wanted: bool) -> None:
    """The callback of --version."""
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
