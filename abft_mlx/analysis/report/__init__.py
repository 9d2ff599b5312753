"""One self-contained HTML page of a run or a study.

``page.html`` is a jinja2 template with autoescape, ``style.css`` and ``script.js`` go into the
page, and charts are matplotlib's SVG. Every text of a run is escaped, and what no reader could see
is made visible.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from abft_mlx import __version__, files
from abft_mlx.analysis.drawing import study_facts, study_seen
from abft_mlx.analysis.figures import style
from abft_mlx.analysis.plots import Plot
from abft_mlx.analysis.report.attention import panel, percent
from abft_mlx.analysis.run_data import Evaluation, Method, RunData, is_run, read_run, short
from abft_mlx.analysis.run_plots import run_plots
from abft_mlx.analysis.study_data import Facts, measurements
from abft_mlx.analysis.study_tables import NOTHING, intro, p_value, points, sections
from abft_mlx.errors import OutputError

__all__ = ["Report", "write_report"]

REPORT_FILE = "report.html"
GENERATOR = "abft-mlx report"
_FOLDER = Path(__file__).resolve().parent
# Sections of a run's page, with the figures of each. What of these is missing is worth a note,
# but for those that need another command or setting.
_RUN_SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("result", "Result", ("confusion", "reliability")),
    ("attention", "Attention over the prompts", ()),
    ("training", "Training", ("training", "time_to_accuracy")),
    ("layers", "Layer by layer", ("label_attention", "shift")),
    ("figures", "Figures", ("attention", "detectors")),
    ("recipe", "Recipe", ()),
    ("made-with", "Made with", ()),
    ("reproduce", "How to make it again", ()),
)
_OPTIONAL = ("time_to_accuracy", "detectors")
_OBJECTIVES = {"abft": "ABFT", "end_to_end": "End to end", "read_out": "Read-out"}
_METHODS = {
    "vanilla": "the untrained base, its label probabilities as they are",
    "zero_shot": "the untrained base without demonstrations",
    "contextual": "contextual calibration of the untrained base",
    "domain": "domain calibration of the untrained base",
    "batch": "batch calibration of the untrained base",
    "hidden": "calibration on hidden states of the untrained base",
    "knn": "nearest neighbours among the base's predictions",
    "abft": "ABFT, as the recipe has it",
    "end_to_end": "cross-entropy of the label; W_Q, W_K and the LM head train",
    "end_to_end_qk": "cross-entropy of the label; W_Q and W_K train",
    "metaicl": "cross-entropy on all other tasks of the study, measured on this one",
    "abft_mixture": "ABFT on all other tasks of the study, measured on this one",
    "no_pid": "ABFT without the controller of A",
    "no_filter": "ABFT without the controller and without the head filter",
    "no_punish": "ABFT with A = 0",
    "no_reward": "ABFT with B = 0",
    "plane": "the weights of two methods mixed, over a grid",
    "extrapolate": "ABFT's change times a factor chosen on validation prompts",
}
_CONFUSIONS_SHOWN = 8
# Control characters, marks of the direction of text, and odd line ends; newlines and tabs stay.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)


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


@dataclass
class Section:
    """A part of the page: its anchor, title, paragraphs or tables, figures, and what is missing."""

    key: str
    title: str
    blocks: list[Any] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
        figures: whether to draw the charts, which takes seconds.
        tell: called with a line before each figure is drawn.

    Raises:
        OutputError: there is no run or study, one of its files is broken, or the output is a
            folder, is another program's file, or cannot be written.
        RunError: the disk is full.
    """
    if not source.exists():
        raise OutputError(f"{source}: there is no such run or study")
    default = source / REPORT_FILE
    if source.is_file():
        default = source.with_name(source.name.split(".")[0] + ".html")
    target = output or default
    _check(target)
    without = (style.missing() or "").removeprefix("no figures: ")
    pages = _Drawer(figures and not without, tell)
    if is_run(source):
        kind, context = "run", _run_page(read_run(source), pages)
    else:
        kind, context = "study", _study_page(source, pages)
    shown: list[Section] = context["sections"]
    if figures and without and pages.left_out:
        shown[0].notes.append(f"{', '.join(pages.left_out)}: {without}")
    files.write_text(target, _rendered({**context, "kind": kind}))
    missing = dict.fromkeys(note for section in shown for note in section.notes)
    titles = tuple(section.title for section in shown)
    return Report(target, kind, target.stat().st_size, titles, tuple(missing))


class _Drawer:
    """Draws figures as SVG, or notes their names where none can be drawn."""

    def __init__(self, wanted: bool, tell: Callable[[str], None]) -> None:
        self.wanted, self.tell, self.left_out = wanted, tell, list[str]()

    def draw(self, name: str, plots: Iterable[Plot]) -> list[dict[str, Any]]:
        """The SVG and caption of each plot of a figure."""
        if not self.wanted:
            self.left_out.append(name)
            return []
        made = []
        for plot in plots:
            self.tell(f"drawing {plot.stem}")
            svg = style.svg(plot.stem, plot.draw, height=plot.height)
            svg = svg.replace("<svg ", '<svg role="img" ', 1)
            made.append({"stem": plot.stem, "caption": plot.caption, "svg": Markup(svg)})
        return made


def _check(target: Path) -> None:
    """A report is replaced, anything else is not."""
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; name a file with --output")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: cannot be written ({target.parent} is no folder)")
    if target.exists():
        try:
            with target.open(encoding="utf-8", errors="replace") as held:
                ours = f'content="{GENERATOR}"' in held.read(4096)
        except OSError as error:
            raise files.write_failure(target, error) from error
        if not ours:
            raise OutputError(f"{target}: is no report of abft-mlx; choose another --output")


def visible(value: Any) -> Any:
    """A text without anything that a browser would obey or could not show."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    shown = _INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", value)
    return re.sub("[\ud800-\udfff]", "\ufffd", shown)


def _rendered(context: Mapping[str, Any]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined,
        finalize=visible, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # The order of states and measures means something to the script.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "percent": percent, "rate": _rate, "interval": _interval, "points": points,
        "p_value": p_value, "size": _size, "duration": _duration, "short": short,
        "comma": "{:,}".format, "table": _table,
    }  # fmt: skip
    script, sheet = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("script.js", "style.css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("page.html").render(
        **context, version=__version__, generator=GENERATOR, digest=digest, script=Markup(script),
        style=Markup(sheet),
    )  # fmt: skip


def _table(
    rows: Sequence[Sequence[str]], header: Sequence[str], caption: str = "", name: str = "table"
) -> dict[str, Any]:
    """A table for the template; columns that hold words stand to the left."""
    number = re.compile(r"\s*([-+−–<]|\d|$)")
    words = [any(not number.match(row[n]) for row in rows) for n in range(len(header))]
    return {"header": header, "rows": rows, "caption": caption, "name": name, "words": words}


def _rate(value: float | None) -> str:
    """A rate in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}%"


def _interval(ends: tuple[float, float] | None) -> str:
    """Both ends of an interval in percent."""
    return "" if ends is None else f"{100 * ends[0]:.1f}% to {100 * ends[1]:.1f}%"


def _size(count_bytes: float) -> str:
    """Bytes as a person reads them."""
    unit, factor = next(
        (one for one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count_bytes >= one[1]),
        ("bytes", 1),
    )
    return f"{count_bytes / factor:.3g} {unit}"


def _duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    minutes = round(seconds / 60)
    long = f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds:.3g} s" if seconds < 120 else long


def _run_page(run: RunData, drawer: _Drawer) -> dict[str, Any]:
    """What the template shows of a run."""
    wanted = [name for _, _, names in _RUN_SECTIONS for name in names]
    drawable = {one.name: one for one in run_plots(run, only=wanted)}
    shown: dict[str, Section] = {}
    for key, title, names in _RUN_SECTIONS:
        section = shown[key] = Section(key, title)
        for name in names:
            if drawable[name].plots:
                section.figures += drawer.draw(name, drawable[name].plots)
            elif name not in _OPTIONAL:
                note = drawable[name].missing.replace(str(run.folder), "RUN")
                section.notes += [note] * (note not in section.notes)
    if drawable["attention"].missing:
        shown["attention"].notes, shown["figures"].notes = shown["figures"].notes, []
    if not shown["figures"].figures:
        del shown["figures"]
    measured = run.evaluation or Evaluation()
    before, after = measured.state("before"), measured.state("after")
    heads = run.heads if run.heads and not drawable["label_attention"].missing else None
    return {
        "title": f"{_OBJECTIVES.get(run.objective, run.objective)}: {run.title}",
        "run": run,
        "measured": measured,
        "shared": next(
            ((before[name], after[name], name) for name in after if name in before), None
        ),
        "methods": [
            (who, name, methods[name])
            for name in dict.fromkeys([*before, *after])
            for who, methods in (("base", before), ("adapter", after))
            if name in methods
        ],
        "confused": _confused(measured.labels, after or before),
        "protocols": _protocols(measured),
        "heads": panel(heads) if heads else None,
        "sections": list(shown.values()),
    }


def _confused(names: Sequence[str], methods: Mapping[str, Method]) -> list[str]:
    """The most frequent confusions of the first method that has a table of them."""
    tables = [method.counts(len(names)) for method in methods.values()]
    counts = next((table for table in tables if table is not None), np.zeros((0, 0), int))
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS_SHOWN]
    pairs = [np.unravel_index(at, wrong.shape) for at in order if wrong.flat[at]]
    return [f"{names[row]} taken for {names[column]}: {wrong[row, column]:,}"
            for row, column in pairs]  # fmt: skip


def _protocols(measured: Evaluation) -> dict[str, Any] | None:
    """What other protocols measured, number by number."""
    rows = []
    for part in ("robustness", "bias", "unseen", "transfer"):
        ours, theirs = (
            dict(_leaves(getattr(side, part))) if side else {} for side in (measured, measured.base)
        )
        for key in dict.fromkeys([*ours, *theirs]):
            name = ": ".join((part, *key)).replace("_", " ")
            rows.append([name, *(f"{side[key]:.4g}" if key in side else NOTHING
                                 for side in (theirs, ours))])  # fmt: skip
    return _table(rows, ["", "base", "adapter"], "Other protocols") if rows else None


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], float]]:
    """The numbers inside nested objects, with the way to each."""
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in _leaves(one, (*keys, str(key)))]
    return [(keys, value)] if type(value) in (int, float) else []


def _study_page(source: Path, drawer: _Drawer) -> dict[str, Any]:
    """What the template shows of a study."""
    facts, output = study_facts(source)
    seen = study_seen(source, facts, output)
    figures = [one for name, plots in seen.figures.items() for one in drawer.draw(name, plots)]
    tables = [
        Section(
            re.sub(r"[^a-z0-9]+", "-", title.lower()),
            title,
            [
                block if isinstance(block, str) else _table(block[1], block[0], name=title)
                for block in blocks
            ],
        )
        for title, blocks in sections(facts)
    ]
    drawn = Section("figures", "Figures", [], figures, list(seen.notes) if drawer.wanted else [])
    cells = facts.cells
    return {
        "title": f"Study {facts.name}",
        "facts": facts,
        "lead": intro(facts),
        "counts": {
            "model": len({cell.model for cell in cells}),
            "task": len({cell.task for cell in cells}),
            "method": len({cell.method for cell in cells}),
            "training seed": len({cell.seed for cell in cells} - {None}),
        },
        "methods": _methods(facts),
        "heads": None,
        "sections": [
            *tables[:1],
            *([drawn] if drawn.figures or drawn.notes else []),
            *tables[1:],
            Section("methods", "What each method is"),
            Section("cells", "Cells"),
            Section("reproduce", "How to make it again"),
        ],
    }


def _methods(facts: Facts) -> list[tuple[str, str]]:
    """What each method of a study is."""
    like = {cell.method: cell.like for cell in facts.cells}
    rows = []
    for name in dict.fromkeys(one.method for one in measurements(facts)):
        base, _, more = name.partition(" + ")
        what = _METHODS.get(base)
        if what is None and like.get(base) in _METHODS:
            what = f"as {like[base]} ({_METHODS[like[base]]}), with settings of the study's own"
        rows.append((name, (what or NOTHING) + (f"; then {more}" if more else "")))
    return rows
