"""From the folder of a run or a study to tables and figures on disk."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from abft_mlx import files
from abft_mlx.analysis.figures import style
from abft_mlx.analysis.plots import Plot
from abft_mlx.analysis.run_data import RunData, is_run, of_heads, read_run
from abft_mlx.analysis.run_plots import (
    beside_notes,
    heads_figure_names,
    run_figure_names,
    run_plots,
)
from abft_mlx.analysis.study_data import SCHEMA, Facts, facts, read_facts
from abft_mlx.analysis.study_plots import check, figure_names, study_plots, without
from abft_mlx.analysis.study_tables import table_csv, table_md
from abft_mlx.errors import OutputError, UsageError
from abft_mlx.study import read as read_cells

STUDY_FILE = "study.json"
# What is drawn of a study beside what its file names, and worth a line where it cannot be.
ADDED = ("training", "interpolation", "confusion", "reliability")
EXPECTED = ("confusion", "reliability")


@dataclass(frozen=True)
class Seen:
    """What there is to draw of a run or a study.

    Attributes:
        source: the folder or file.
        kind: ``run`` or ``study``.
        output: the default folder for figures.
        figures: what to draw, by the figure's name.
        notes: a line for each thing that cannot be drawn, with the way to get it.
    """

    source: Path
    kind: str
    output: Path
    figures: dict[str, list[Plot]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One figure that was written."""

    name: str
    caption: str
    files: tuple[Path, ...]


class Written(list[Path]):
    """The files that were written, and ``notes`` on what could not be."""

    def __init__(self, paths: Sequence[Path] = (), notes: Sequence[str] = ()) -> None:
        super().__init__(paths)
        self.notes = tuple(notes)


def look(source: Path, *, only: Sequence[str] | None = None, beside: Sequence[Path] = ()) -> Seen:
    """What there is to draw of a run or a study; no model is opened.

    Args:
        source: a run folder, a file of ``abft-mlx heads``, a study's folder, or a file of a study's
            facts, ``.gz`` or not.
        only: names of figures; by default all that can be drawn.
        beside: folders of runs whose states are to stand beside the run's.

    Raises:
        OutputError: nothing lies there, or a file is broken.
        UsageError: a figure has no such name.
    """
    if is_run(source):
        _check(only, run_figure_names())
        return run_seen(source, read_run(source), source / "figures", only, beside)
    if source.suffix == ".npz" and not source.is_dir():
        _check(only, heads_figure_names())
        run = of_heads(source)
        weighted = run.heads and any(one.weight is not None for one in run.heads.states.values())
        names = [one for one in heads_figure_names() if weighted or one != "head_weights"]
        output = source.with_name(f"{source.stem}-figures")
        return run_seen(source, run, output, only or names, beside)
    if beside:
        raise UsageError(f"--beside: {source} is no run folder, and only a run has states")
    _check(only, figure_names())
    document, output = study_facts(source)
    return study_seen(source, document, output, only)


def draw(
    seen: Seen,
    output: Path,
    *,
    formats: Sequence[str] = ("svg", "png"),
    width: str = "page",
    tell: Callable[[Figure], None] = lambda _figure: None,
) -> list[Figure]:
    """Write what there is to draw.

    Args:
        seen: from :func:`look`.
        output: the folder; made if it is not there.
        formats: of ``figures.style.FORMATS``.
        width: of ``figures.style.WIDTHS``.
        tell: called with every figure.

    Raises:
        UsageError: matplotlib is not there.
        OutputError: the folder cannot be written.
        RunError: the disk is full.
    """
    missing = style.missing()
    if missing:
        raise UsageError(missing)
    _make(output)
    written = []
    for name, plots in seen.figures.items():
        for plot in plots:
            paths = plot.write(output, tuple(formats), width)
            written.append(Figure(name, plot.caption, tuple(paths)))
            tell(written[-1])
    return written


def write_study(folder: Path, study: Any, cells: Sequence[dict[str, Any]]) -> Written:
    """Write ``table.md``, ``table.csv``, ``study.json`` and the figures that the study names.

    The same cells, in any order, make the same bytes.

    Args:
        folder: where to; made if it is not there.
        study: anything with ``name``, ``description``, ``paper`` and ``figures``.
        cells: the documents of the study's cells, done or failed.

    Returns:
        The files, and notes on what is missing; without matplotlib, that the figures are.

    Raises:
        RecipeError: the study names a figure or a published table that does not exist.
        OutputError: the folder cannot be written.
        RunError: the disk is full.
    """
    check(study)
    document = facts(study, cells)
    read = read_facts(document)
    _make(folder)
    written = Written([folder / name for name in ("table.md", "table.csv", STUDY_FILE)])
    files.write_text(written[0], table_md(read))
    files.write_text(written[1], table_csv(read))
    files.write_json(written[2], document)
    missing = style.missing()
    if missing and read.figures:
        written.notes = (missing,)
        return written
    figures = study_plots(read, read.figures)
    written.notes = tuple(without(name, read) for name, plots in figures.items() if not plots)
    for plots in figures.values():
        for plot in plots:
            written += plot.write(folder, ("svg", "png"))
    return written


def run_seen(
    source: Path,
    run: RunData,
    output: Path,
    only: Sequence[str] | None = None,
    beside: Sequence[Path] = (),
) -> Seen:
    """What there is to draw of a run that was read; arguments as of :func:`look`."""
    others = [read_run(folder) for folder in beside]
    made = run_plots(run, others, only)
    reasons: dict[str, list[str]] = {}
    for one in made:
        if one.missing:
            reasons.setdefault(one.missing, []).append(one.name)
    notes = [f"{', '.join(names)}: not drawn: {reason}" for reason, names in reasons.items()]
    figures = {one.name: list(one.plots) for one in made if one.plots}
    return Seen(source, "run", output, figures, (*notes, *beside_notes(run, others)))


def study_seen(source: Path, facts: Facts, output: Path, only: Sequence[str] | None = None) -> Seen:
    """What there is to draw of a study's facts; arguments as of :func:`look`."""
    known = [name for name in facts.figures if name in figure_names()]
    wanted = list(dict.fromkeys([*known, *ADDED])) if only is None else only
    expected = list(dict.fromkeys([*known, *EXPECTED])) if only is None else only
    figures = study_plots(facts, wanted)
    notes = [without(name, facts) for name in expected if not figures[name]]
    notes += [
        f"figure {name}: this abft-mlx draws no such figure"
        for name in facts.figures
        if name not in known
    ]
    figures = {name: plots for name, plots in figures.items() if plots}
    return Seen(source, "study", output, figures, tuple(notes))


def study_facts(source: Path) -> tuple[Facts, Path]:
    """A study's facts, and where its figures go.

    Raises:
        OutputError: there is no study, or a file is broken.
    """
    if source.is_dir():
        if (source / STUDY_FILE).exists():
            return _facts_file(source / STUDY_FILE), source
        if (source / "cells").is_dir():
            return _unfinished(source), source
        raise OutputError(
            f"{source}: holds neither a run (run.json) nor a study (study.json, or cells/); name a "
            "folder that finetune or study wrote"
        )
    if not source.exists():
        raise OutputError(f"{source}: there is no such file or folder")
    if source.name == STUDY_FILE:
        return _facts_file(source), source.parent
    return _facts_file(source), source.parent / f"{source.name.partition('.json')[0]}-figures"


def _facts_file(path: Path) -> Facts:
    """The facts in a file, compressed or not."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        document = files.parse_json(content)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise OutputError(
            f"{path}: cannot be read ({error}); name a folder that finetune or study wrote"
        ) from None
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise OutputError(
            f"{path}: is no study's facts; name a folder that finetune or study wrote"
        )
    problem = files.schema_problem(document.get("schema"), SCHEMA, "make it again: abft-mlx study")
    if problem:
        raise OutputError(f"{path}: {problem}")
    return read_facts(document, path)


def _unfinished(folder: Path) -> Facts:
    """The facts of a study whose cells are not all done, so that none are written yet."""
    path = folder / "study.yaml"
    try:
        study = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        keys = ("description", "paper", "figures")
        named = {"name": study.get("name", folder.name), **{key: study.get(key) for key in keys}}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise OutputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    return read_facts(facts(SimpleNamespace(**named), read_cells(folder)), folder)


def _check(only: Sequence[str] | None, known: Sequence[str]) -> None:
    """Refuse names of figures that do not exist."""
    for name in only or ():
        if name not in known:
            raise UsageError(
                f"--only {name}: no figure is called that; there are {', '.join(known)}"
            )


def _make(folder: Path) -> None:
    """Make a folder if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_failure(folder, error) from error
