"""From a run or a study to its report on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from abft_mlx import documents, files
from abft_mlx.analysis.drawing import look, study_facts
from abft_mlx.analysis.figures import style
from abft_mlx.analysis.plotting import Plot
from abft_mlx.analysis.report.checks import check
from abft_mlx.analysis.report.figures import drawn
from abft_mlx.analysis.report.page import GENERATOR
from abft_mlx.analysis.report.run import run_page
from abft_mlx.analysis.report.study import study_page
from abft_mlx.analysis.run_files import is_run, read_files
from abft_mlx.errors import OutputError

REPORT_FILE = "report.html"
# Of a run's figures those that say more than the page's own charts, tables and map do.
RUN_FIGURES = ("attention", "time_to_accuracy", "detectors")


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        path: the file.
        kind: ``run`` or ``study``.
        size_bytes: of the file.
        sections: titles in order.
        missing: what could not be shown, and how to get it; a line each.
    """

    path: Path
    kind: str
    size_bytes: int
    sections: tuple[str, ...]
    missing: tuple[str, ...]


def write_report(
    source: Path,
    output: Path | None = None,
    *,
    figures: bool = True,
    tell: Callable[[str], None] = lambda _line: None,
) -> Report:
    """Write the page of a run or a study; the same files make the same bytes.

    Args:
        source: a run's folder, a study's folder, or a study.json, which may be compressed.
        output: the file; else report.html in the folder, or the study's name beside its file.
        figures: whether matplotlib draws what the page cannot, which takes seconds.
        tell: told of each figure before it is drawn.

    Raises:
        OutputError: there is no run or study, one of its files is broken, or the output is a
            folder, is another program's file, or cannot be written.
        RunError: the disk is full.
    """
    if not source.exists():
        raise OutputError(f"{source}: there is no such run or study")
    target = output or _default(source)
    _check(target)
    kind = "run" if is_run(source) else "study"
    if kind == "run":
        run = read_files(source)
        check(run)
        plots, untold = _plots(source, figures, RUN_FIGURES)
        with documents.reading(source):
            text, sections, missing = run_page(run, drawn(plots, tell), untold)
    else:
        with documents.reading(source):
            document, _ = study_facts(source)
            plots, untold = _plots(source, figures, None)
            text, sections, missing = study_page(document, drawn(plots, tell), untold)
    files.write_text(target, text)
    size = target.stat().st_size
    return Report(target, kind, size, tuple(sections), tuple(missing))


def _plots(
    source: Path, wanted: bool, only: tuple[str, ...] | None
) -> tuple[list[Plot], tuple[str, ...]]:
    """What there is for matplotlib to draw, and what there is not."""
    if not wanted:
        return [], ()
    seen = look(source, only=only)
    # The page itself says what of a run is missing.
    notes = () if seen.kind == "run" else seen.notes
    missing = style.missing()
    if missing and seen.figures:
        return [], (f"{', '.join(seen.figures)}: {missing.removeprefix('no figures: ')}", *notes)
    return [plot for some in seen.figures.values() for plot in some], notes


def _default(source: Path) -> Path:
    if source.is_file():
        return source.with_name(source.name.split(".")[0] + ".html")
    return source / REPORT_FILE


def _check(target: Path) -> None:
    """A report is replaced, anything else is not."""
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name a file with --output")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: cannot be written ({target.parent} is no folder)")
    if not target.exists():
        return
    try:
        with target.open(encoding="utf-8", errors="replace") as held:
            ours = f'content="{GENERATOR}"' in held.read(4096)
    except OSError as error:
        raise files.write_failure(target, error) from error
    if not ours:
        raise OutputError(f"{target}: is no report of abft-mlx; choose another --output")
