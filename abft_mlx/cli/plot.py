"""``abft-mlx plot`` and ``report``: a run or a study, drawn from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft_mlx.cli import options
from abft_mlx.cli.progress import size
from abft_mlx.cli.shell import Shell
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from abft_mlx.analysis.style import Plot


def plot(
    source: Path,
    *,
    output: Path | None = None,
    only: list[str] | None = None,
    formats: str = "svg,png",
    only_list: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Draw a run or a study.

    Training, attention, heads, moved weights, answers: no model is opened. What cannot be drawn is
    named, with the command that measures it.

    Args:
        source (RUN|STUDY): A run folder, a .npz file of heads, a study's folder, or a study.json,
            compressed or not.
        output (DIR): Where the figures go. [default: RUN/figures; a study's own folder]
        only (NAME,…): Draw these figures, of those that --list names. [default: all that can be
            drawn]
        formats (--format A,B): Of svg, png and pdf.
        only_list (--list): Say what can be drawn; draw nothing.
    """
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        from abft_mlx import analysis
        from abft_mlx.analysis.style import FORMATS

        chosen = options.names(formats, "--format")
        for name in chosen:
            if name not in FORMATS:
                raise UsageError(f"--format {formats}: {name!r} is none of {', '.join(FORMATS)}")
        wanted = options.names(",".join(only), "--only") if only else None
        drawing = analysis.look(source, wanted)
        folder = output or drawing.output
        figures: list[dict[str, Any]] = []
        if only_list:
            for name, plots in drawing.figures.items():
                if not as_json:
                    shell.tell(f"{name}: {', '.join(plot.stem for plot in plots)}")
                figures += [{"name": name, "stem": p.stem, "caption": p.caption} for p in plots]
        elif not drawing.figures:
            reasons = "; ".join(drawing.notes) or "nothing of it was measured"
            raise UsageError(f"{source}: there is nothing to draw: {reasons}")
        else:

            def drawn(name: str, plot: Plot, paths: list[Path]) -> None:
                files = [str(path) for path in paths]
                shell.say(*(f"wrote {file}" for file in files))
                figures.append({"name": name, "caption": plot.caption, "files": files})

            analysis.draw(drawing, folder, formats=chosen, tell=drawn)
        shell.say(*(f"note: {note}" for note in drawing.notes))
    shell.document(
        {
            "schema": 1,
            "kind": drawing.kind,
            "source": str(source),
            "output": str(folder),
            "figures": figures,
            "notes": drawing.notes,
        }
    )


def report(
    source: Path,
    *,
    output: Path | None = None,
    figures: bool = True,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Write one HTML page of a run or a study.

    It needs no network. It holds the example prompts' texts and the recipe: look before you pass
    it on.

    Args:
        source (RUN_OR_STUDY): A run folder, a study's folder, or its study.json.
        output (FILE.html): The page; a report that lies there is replaced. [default: report.html in
            the folder]
        figures: Let matplotlib draw what the page itself cannot; takes some seconds.
    """
    from abft_mlx.analysis.report import write_report

    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        written = write_report(source, output, figures=figures, tell=shell.say)
        count_bytes = written.path.stat().st_size
        shell.say(*(f"note: not in the report: {reason}" for reason in written.missing))
        shell.tell(f"wrote {written.path} ({size(count_bytes)})")
    shell.document(
        {
            "schema": 1,
            "kind": written.kind,
            "output": str(written.path),
            "bytes": count_bytes,
            "sections": written.sections,
            "missing": written.missing,
        }
    )
