"""``abft-mlx report``: one page of a run or a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abft_mlx.cli.options import Json, Quiet
from abft_mlx.cli.shell import Shell


def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_STUDY", help="A run folder, a study's folder, or its study.json."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="The page; a report that lies there is replaced.",
            show_default="report.html in the folder",
        ),
    ] = None,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures/--no-figures",
            help="Let matplotlib draw what the page itself cannot; takes some seconds.",
        ),
    ] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write one HTML file that shows a run or a study and needs no network.

    It holds the example prompts' texts and the recipe: look before you pass it on.
    """
    from abft_mlx.analysis.report import write_report
    from abft_mlx.cli.progress import size

    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        written = write_report(source, output, figures=figures, tell=shell.say)
        for one in written.missing:
            shell.say(f"note: not in the report: {one}")
        shell.tell(f"wrote {written.path} ({size(written.size_bytes)})")
    shell.document(
        {
            "schema": 1,
            "kind": written.kind,
            "output": str(written.path),
            "bytes": written.size_bytes,
            "sections": list(written.sections),
            "missing": list(written.missing),
        }
    )
