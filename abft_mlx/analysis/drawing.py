"""From the folder of a run or a study to tables and figures on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abft_mlx import files
from abft_mlx.analysis import style
from abft_mlx.analysis.run_data import RunData, is_run, parsed, read, read_heads_file, read_run
from abft_mlx.analysis.run_plots import HEADS_FIGURES, RUN_FIGURES
from abft_mlx.analysis.study_data import Facts, facts
from abft_mlx.analysis.study_plots import STUDY_FIGURES, check, study_plots
from abft_mlx.analysis.study_tables import table_csv, table_md
from abft_mlx.analysis.style import Plot
from abft_mlx.errors import OutputError, UsageError
from abft_mlx.study import load as load_study
from abft_mlx.study import read as read_cells

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Drawing:
    """What there is to draw of a run or a study.

    Attributes:
        kind: ``run`` or ``study``.
        output: the default folder for figures.
        figures: what to draw, by the figure's name.
        missing: names of figures by the reason why they cannot be drawn, with the way to get them.
    """

    kind: str
    output: Path
    figures: dict[str, list[Plot]]
    missing: dict[str, list[str]]

    @property
    def notes(self) -> list[str]:
        """A line for each reason."""
        return [f"{', '.join(n)}: not drawn: {reason}" for reason, n in self.missing.items()]


class Written(list[Path]):
    """The files that were written, and ``notes`` on what could not be."""

    notes: Sequence[str] = ()


def look(source: Path, only: Sequence[str] | None = None) -> Drawing:
    """What there is to draw of a run or a study; no model is opened.

    Args:
        source: a run folder, a file of ``abft-mlx heads``, a study's folder, or a file of a study's
            facts, ``.gz`` or not.
        only: names of figures; by default all that can be drawn.
    """
    if is_run(source):
        names = _names(only, RUN_FIGURES)
        return run_drawing(read_run(source), source / "figures", names)
    if source.suffix == ".npz" and not source.is_dir():
        names = _names(only, HEADS_FIGURES)
        output = source.with_name(f"{source.stem}-figures")
        return run_drawing(read_heads_file(source), output, names)
    names = _names(only, STUDY_FIGURES)
    document, output = study_facts(source)
    return study_drawing(document, output, None if only is None else names)


def draw(
    drawing: Drawing,
    output: Path,
    *,
    formats: Sequence[str] = ("svg", "png"),
    tell: Callable[[str, Plot, list[Path]], None] = lambda *_: None,
) -> None:
    """Write what there is to draw; ``tell`` gets each figure's name, plot and files."""
    missing = style.missing()
    if missing:
        raise UsageError(missing)
    _make(output)
    for name, plots in drawing.figures.items():
        for plot in plots:
            tell(name, plot, plot.write(output, formats))


def write_study(folder: Path, study: Any, cells: Sequence[dict[str, Any]]) -> Written:
    """Write ``table.md``, ``table.csv``, ``study.json`` and the figures that the study names.

    The same cells, in any order, make the same bytes.

    Args:
        folder: where to; made if it is not there.
        study: anything with ``name``, ``description``, ``paper`` and ``figures``.
        cells: the documents of the study's cells, done or failed.
    """
    check(study)
    document = facts(study, cells)
    parts = parsed(Facts, document, folder / STUDY_FILE)
    _make(folder)
    written = Written([folder / name for name in ("table.md", "table.csv", STUDY_FILE)])
    files.write_text(written[0], table_md(parts))
    files.write_text(written[1], table_csv(parts))
    files.write_json(written[2], document)
    missing = style.missing()
    if missing and parts.figures:
        written.notes = [missing]
        return written
    drawing = study_drawing(parts, folder, parts.figures)
    written.notes = drawing.notes
    for plots in drawing.figures.values():
        for plot in plots:
            written += plot.write(folder)
    return written


def run_drawing(run: RunData, output: Path, names: Sequence[str]) -> Drawing:
    """What there is to draw of a run that was read."""
    plots = {name: RUN_FIGURES[name](run) for name in RUN_FIGURES if name in names}
    return _drawing("run", output, plots)


def study_drawing(facts: Facts, output: Path, names: Sequence[str] | None = None) -> Drawing:
    """What there is to draw of a study's facts: by default all, and what it names is missed."""
    plots: dict[str, list[Plot] | str] = {}
    for name in STUDY_FIGURES if names is None else names:
        some = study_plots(facts, name)
        if some or name in (facts.figures if names is None else names):
            plots[name] = some or "no cell that is done measured what it shows"
    return _drawing("study", output, plots)


def study_facts(source: Path) -> tuple[Facts, Path]:
    """A study's facts, and where its figures go."""
    path, output = source, source.parent
    if source.is_dir():
        path, output = source / STUDY_FILE, source
        if not path.exists() and (source / "cells").is_dir():
            # Not all cells are done, so that no facts are written yet.
            unfinished = facts(load_study(source), read_cells(source))
            return parsed(Facts, unfinished, source), source
    elif source.name != STUDY_FILE:
        output = source.parent / f"{source.name.partition('.json')[0]}-figures"
    document = read(path, Facts)
    if document is None:
        what = "holds neither a run (run.json) nor a study (study.json, or cells/)"
        if not source.exists():
            what = "no such file or folder"
        raise OutputError(f"{source}: {what}; name a folder that finetune or study wrote")
    return document, output


def _names(only: Sequence[str] | None, names: Iterable[str]) -> Sequence[str]:
    """The figures to draw; refuses names of figures that do not exist."""
    every = list(names)
    for name in only or ():
        if name not in every:
            raise UsageError(
                f"--only {name}: no figure is called that; there are {', '.join(every)}"
            )
    return every if only is None else only


def _drawing(kind: str, output: Path, plots: Mapping[str, list[Plot] | str]) -> Drawing:
    """What can be drawn, and what cannot."""
    missing: dict[str, list[str]] = {}
    for name, reason in plots.items():
        if isinstance(reason, str):
            missing.setdefault(reason, []).append(name)
    some = {name: plot for name, plot in plots.items() if not isinstance(plot, str)}
    return Drawing(kind, output, some, missing)


def _make(folder: Path) -> None:
    """Make a folder if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_failure(folder, error) from error
