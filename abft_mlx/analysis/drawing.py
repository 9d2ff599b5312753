"""From the folder of a run, or a study's facts, to files of figures."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from abft_mlx import documents, files
from abft_mlx.analysis import plots, run_facts, run_files
from abft_mlx.analysis.facts import SCHEMA, facts
from abft_mlx.analysis.figures import style
from abft_mlx.analysis.plotting import Plot
from abft_mlx.analysis.run_plots import (
    beside_notes,
    heads_figure_names,
    run_figure_names,
    run_plots,
)
from abft_mlx.errors import OutputError, RecipeError, UsageError
from abft_mlx.files import schema_problem
from abft_mlx.recipe.files import parse
from abft_mlx.study import read as read_cells

STUDY_FILE = "study.json"
MOST_FACTS_BYTES = 200_000_000
# What is drawn of a study beside what its file names, and worth a line where it cannot be.
ADDED = ("training", "interpolation", "confusion", "reliability")
EXPECTED = ("confusion", "reliability")


@dataclass(frozen=True)
class Seen:
    """What there is to draw of a run or a study.

    Attributes:
        source: the folder or file.
        kind: ``run`` or ``study``.
        output: where figures go if nothing is said.
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


def look(source: Path, *, only: Sequence[str] | None = None, beside: Sequence[Path] = ()) -> Seen:
    """What there is to draw of a run or a study; no model is opened.

    Args:
        source: a run folder, a file of ``abft-mlx heads``, a study's folder, or a file of a study's
            facts, ``.gz`` or not.
        only: names of figures; by default all that can be drawn.
        beside: folders of runs whose states are to stand beside the run's.

    Raises:
        UsageError: nothing lies there, a file is broken, or a figure has no such name.
    """
    if run_files.is_run(source):
        return _run(source, only, beside)
    if source.suffix == ".npz" and not source.is_dir():
        return _heads(source, only, beside)
    if beside:
        raise UsageError(f"--beside: {source} is no run folder, and only a run has states")
    with documents.reading(source):
        document, output = study_facts(source)
        return _of_study(source, document, output, only)


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
        tell: told of every figure.

    Raises:
        UsageError: matplotlib is not there.
        OutputError: the folder cannot be written.
        RunError: the disk is full.
    """
    missing = style.missing()
    if missing:
        raise UsageError(missing)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_failure(output, error) from error
    written = []
    for name, some in seen.figures.items():
        for one in some:
            inches = None if one.height is None else one.height(style.WIDTHS[width])
            with documents.reading(seen.source):
                paths = style.write(
                    output / one.stem, one.draw, one.caption, height=inches, width=width,
                    formats=formats,
                )  # fmt: skip
            written.append(Figure(name, one.caption, tuple(paths)))
            tell(written[-1])
    return written


def _run(source: Path, only: Sequence[str] | None, beside: Sequence[Path]) -> Seen:
    _check(only, run_figure_names())
    return _of_run(source, run_facts.read_run(source), source / "figures", only, beside)


def _heads(source: Path, only: Sequence[str] | None, beside: Sequence[Path]) -> Seen:
    _check(only, heads_figure_names())
    run = run_facts.of_heads(source)
    output = source.with_name(f"{source.stem}-figures")
    return _of_run(source, run, output, only or heads_figure_names(), beside)


def _of_run(
    source: Path,
    run: run_facts.RunFacts,
    output: Path,
    only: Sequence[str] | None,
    beside: Sequence[Path],
) -> Seen:
    others = [run_facts.read_run(one) for one in beside]
    made = run_plots(run, others, only)
    reasons: dict[str, list[str]] = {}
    for one in made:
        if one.missing:
            reasons.setdefault(one.missing, []).append(one.name)
    notes = [f"{', '.join(names)}: not drawn: {reason}" for reason, names in reasons.items()]
    return Seen(
        source=source,
        kind="run",
        output=output,
        figures={one.name: list(one.plots) for one in made if one.plots},
        notes=(*notes, *beside_notes(run, others)),
    )


def _of_study(
    source: Path, document: dict[str, Any], output: Path, only: Sequence[str] | None
) -> Seen:
    _check(only, plots.names())
    unknown = [one for one in document["figures"] if one not in plots.names()]
    named = [one for one in document["figures"] if one not in unknown]
    wanted = list(only) if only is not None else list(dict.fromkeys([*named, *ADDED]))
    try:
        figures = plots.by_name(document, wanted)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(
            f"{source}: is no study's facts that this abft-mlx can draw ({error!r}); write it anew "
            "with abft-mlx study"
        ) from error
    expected = wanted if only is not None else list(dict.fromkeys([*named, *EXPECTED]))
    notes = [plots.without(one, document) for one in expected if not figures[one]]
    notes += [f"figure {one}: this abft-mlx draws no such figure" for one in unknown]
    return Seen(
        source=source,
        kind="study",
        output=output,
        figures={name: some for name, some in figures.items() if some},
        notes=tuple(notes),
    )


def _check(only: Iterable[str] | None, known: Sequence[str]) -> None:
    for one in only or ():
        if one not in known:
            raise UsageError(
                f"--only {one}: no figure is called that; there are {', '.join(known)}"
            )


def study_facts(source: Path) -> tuple[dict[str, Any], Path]:
    """A study's facts, and where its figures go.

    Raises:
        OutputError: there is no study, or a file is broken.
    """
    if source.is_dir():
        if (source / STUDY_FILE).exists():
            return _facts_file(source / STUDY_FILE), source
        if (source / "cells").is_dir():
            return _made(source), source
        raise OutputError(
            f"{source}: holds neither a run (run.json) nor a study (study.json, or cells/); name a "
            "folder that finetune or study wrote"
        )
    if not source.exists():
        raise OutputError(f"{source}: there is no such file or folder")
    if source.name == STUDY_FILE:
        return _facts_file(source), source.parent
    return _facts_file(source), source.parent / f"{source.name.partition('.json')[0]}-figures"


def _unpacked(path: Path) -> bytes:
    packed = files.read_bytes(path, MOST_FACTS_BYTES)
    if packed[:2] != b"\x1f\x8b":
        return packed
    with gzip.open(io.BytesIO(packed)) as stream:
        content = stream.read(MOST_FACTS_BYTES + 1)
    if len(content) > MOST_FACTS_BYTES:
        raise ValueError(f"it unpacks to more than {MOST_FACTS_BYTES / 1e6:,.0f} MB")
    return content


def _facts_file(path: Path) -> dict[str, Any]:
    try:
        document = files.parse_json(_unpacked(path))
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise OutputError(f"{path}: cannot be read ({error}); name a study's facts") from None
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise OutputError(f"{path}: is no study's facts (study.json, or one of docs/claims)")
    problem = schema_problem(document.get("schema"), SCHEMA, "make it again: abft-mlx study")
    if problem:
        raise OutputError(f"{path}: {problem}")
    return {"paper": {}, "figures": [], "failed": [], **document}


def _made(folder: Path) -> dict[str, Any]:
    """The facts of a study whose cells are not all done, so that none are written yet."""
    told: dict[str, Any] = {}
    path = folder / "study.yaml"
    if path.exists():
        try:
            told = parse(path.read_text(encoding="utf-8"), "YAML")
        except (OSError, ValueError, RecipeError) as error:
            raise OutputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    study = SimpleNamespace(
        name=told.get("name", folder.name),
        description=told.get("description"),
        paper=told.get("paper"),
        figures=told.get("figures"),
    )
    return facts(study, read_cells(folder))
