"""``abft-mlx plot``: the figures of a run or a study, from its files alone."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli.options import Json, Quiet
from abft_mlx.cli.shell import Shell
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from abft_mlx.analysis import Figure, Seen


class Width(str, Enum):
    """How wide a figure is."""

    page = "page"
    column = "column"


def plot(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|STUDY",
            help="A run folder, a .npz file of heads, a study's folder, or a study.json, "
            "compressed or not.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the figures go.",
            show_default="RUN/figures; a study's own folder",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,…",
            help="Draw these figures, of those that --list names.",
            show_default="all that can be drawn",
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="Another run of the same base, such as an end-to-end one, whose training, "
            "attention and shifts stand beside; may be given several times.",
            show_default=False,
        ),
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", metavar="A,B", help="Of svg, png and pdf.")
    ] = "svg,png",
    width: Annotated[
        Width, typer.Option(help="Across a page (6.4 inches), or a column of two (3.3).")
    ] = Width.page,
    only_list: Annotated[
        bool, typer.Option("--list", help="Say what can be drawn; draw nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw a run or a study: training, attention, heads, moved weights, answers.

    No model is opened. What cannot be drawn is told, with the command that measures it.
    """
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        chosen = _formats(formats)
        names = None if only is None else _names(only)
        from abft_mlx import analysis

        seen = analysis.look(source, only=names, beside=beside or ())
        folder = output or seen.output
        figures = []
        if only_list:
            _list(shell, seen)
        else:
            figures = _draw(shell, seen, folder, chosen, width.value)
    shell.document(_document(seen, folder, figures, only_list=only_list))


def _formats(text: str) -> tuple[str, ...]:
    from abft_mlx.analysis.figures.style import FORMATS

    names = tuple(dict.fromkeys(one.strip() for one in text.split(",")))
    unknown = [one for one in names if one not in FORMATS]
    if unknown:
        raise UsageError(f"--format {text}: {unknown[0]!r} is none of {', '.join(FORMATS)}")
    return names


def _names(given: list[str]) -> list[str]:
    names = [one.strip() for text in given for one in text.split(",")]
    return list(dict.fromkeys(one for one in names if one))


def _draw(
    shell: Shell, seen: Seen, folder: Path, formats: tuple[str, ...], width: str
) -> list[Figure]:
    from abft_mlx import analysis

    if not seen.figures:
        reasons = "; ".join(seen.notes) or "nothing of what was asked for was measured"
        raise UsageError(f"{seen.source}: there is nothing to draw: {reasons}")
    figures = analysis.draw(
        seen, folder, formats=formats, width=width, tell=lambda one: _told(shell, one)
    )
    _notes(shell, seen)
    return figures


def _told(shell: Shell, one: Figure) -> None:
    for path in one.files:
        shell.say(f"wrote {path}")


def _list(shell: Shell, seen: Seen) -> None:
    if not shell.as_json:
        for name, some in seen.figures.items():
            shell.tell(f"{name}: {', '.join(one.stem for one in some)}")
    _notes(shell, seen)


def _notes(shell: Shell, seen: Seen) -> None:
    for note in seen.notes:
        shell.say(f"note: {note}")


def _document(
    seen: Seen, folder: Path, figures: list[Figure], *, only_list: bool
) -> dict[str, Any]:
    drawn: list[dict[str, Any]]
    if only_list:
        drawn = [
            {"name": name, "stem": one.stem, "caption": one.caption}
            for name, some in seen.figures.items()
            for one in some
        ]
    else:
        drawn = [
            {"name": one.name, "caption": one.caption, "files": [str(path) for path in one.files]}
            for one in figures
        ]
    return {
        "schema": 1,
        "kind": seen.kind,
        "source": str(seen.source),
        "output": str(folder),
        "figures": drawn,
        "notes": list(seen.notes),
    }
