"""One self-contained HTML page of a run or a study.

``page.html`` is a jinja2 template with autoescape, ``style.css`` and ``script.js`` go into the
page, and charts are matplotlib's SVG. Every text of a run is escaped, and what no reader could see
is made visible. Letters: L layers, H heads, T tokens.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.filesize import decimal

from abft_mlx import __version__, files
from abft_mlx.analysis import style
from abft_mlx.analysis.drawing import Drawing, run_drawing, study_drawing, study_facts
from abft_mlx.analysis.run_data import Method, RunData, is_run, read_run, short
from abft_mlx.analysis.run_plots import no_heads
from abft_mlx.analysis.study_tables import NOTHING, intro, p_value, points, sections
from abft_mlx.errors import OutputError
from abft_mlx.induction import Example, Heads

GENERATOR = "abft-mlx report"
_FOLDER = Path(__file__).resolve().parent
# Sections of a run's page, with the figures of each.
_RUN_SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "result": ("Result", ("confusion", "reliability")),
    "attention": ("Attention over the prompts", ("attention",)),
    "training": ("Training", ("training", "time_to_accuracy")),
    "layers": ("Layer by layer", ("label_attention", "shift", "detectors")),
    "recipe": ("Recipe", ()),
    "made-with": ("Made with", ()),
    "reproduce": ("How to make it again", ()),
}
# Figures that need another command or setting: not worth a note where they are missing.
_OPTIONAL = ("time_to_accuracy", "detectors")
# Numbers of every head: attribute of its census or of its detectors, name, and what it is.
MEASURES = {
    "magnitude": ("magnitude", "attention on the demonstrations' labels"),
    "correctness": ("correctness", "attention on right labels minus on wrong ones"),
    "share": ("above filter", "share of prompts in which it is an induction head"),
    "sink": ("sink", "attention on the prompt's first token"),
    "weight": ("weight", "weight in the label-attention read-out, which gives the answer"),
    "previous_token": ("previous token", "on random text: attention on the token before"),
    "duplicate_token": ("duplicate token", "on random text: attention on the same token earlier"),
    "induction": ("repetition", "on random text: attention on what followed the same token"),
}
# Attention is kept in so many steps of each head's largest value on a prompt.
LEVELS = 255
_CONFUSIONS_SHOWN = 8
Draw = Callable[[Drawing, Iterable[str]], list[dict[str, Any]]]
# Control characters, marks of the direction of text, and odd line ends; newlines and tabs stay.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)


@dataclass(frozen=True)
class Report:
    """A report that was written: file, run or study, titles, and what could not be shown."""

    path: Path
    kind: str
    sections: list[str]
    missing: list[str]


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
    """
    if not source.exists():
        raise OutputError(f"{source}: there is no such run or study")
    default = source / "report.html"
    if source.is_file():
        default = source.with_name(source.name.split(".")[0] + ".html")
    target = output or default
    _check(target)
    without = (style.missing() or "").removeprefix("no figures: ")
    drawn = figures and not without
    kind = "run" if is_run(source) else "study"

    def draw(drawing: Drawing, names: Iterable[str]) -> list[dict[str, Any]]:
        """The SVG and caption of each plot of some figures."""
        charts = []
        for plot in (plot for name in names for plot in drawing.figures.get(name, ()) if drawn):
            tell(f"drawing {plot.stem}")
            svg = Markup(plot.svg().replace("<svg ", '<svg role="img" ', 1))
            charts.append({"stem": plot.stem, "caption": plot.caption, "svg": svg})
        return charts

    context = _run_page(source, draw) if kind == "run" else _study_page(source, draw)
    shown: list[Section] = context["sections"]
    if figures and without:
        shown[0].notes.append(f"figures: {without}")
    files.write_text(target, _rendered({**context, "kind": kind}))
    missing = dict.fromkeys(note for section in shown for note in section.notes)
    return Report(target, kind, [section.title for section in shown], list(missing))


def _check(target: Path) -> None:
    """A report is replaced, anything else is not."""
    try:
        if target.exists():
            with target.open(encoding="utf-8", errors="replace") as file:
                if f'content="{GENERATOR}"' not in file.read(4096):
                    raise OutputError(
                        f"{target}: is no report of abft-mlx; choose another --output"
                    )
    except OSError as error:
        raise files.write_failure(target, error) from error


def visible(value: Any) -> Any:
    """A text without anything that a browser would obey or could not show."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    shown = _INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", value)
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
        "rate": _rate, "interval": _interval, "points": points, "p_value": p_value,
        "size": decimal, "duration": _duration, "short": short, "comma": "{:,}".format,
        "table": _table,
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


def _duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


def _run_page(source: Path, draw: Draw) -> dict[str, Any]:
    """What the template shows of a run."""
    run = read_run(source)
    wanted = [name for _, names in _RUN_SECTIONS.values() for name in names]
    drawing = run_drawing(run, source, wanted)
    shown = []
    for key, (title, names) in _RUN_SECTIONS.items():
        section = Section(key, title, figures=draw(drawing, names))
        for reason, missing in drawing.missing.items():
            if set(missing) & set(names) - set(_OPTIONAL):
                section.notes.append(reason.replace(str(run.folder), "RUN"))
        shown.append(section)
    measured, recipe = run.evaluation, source / "recipe.yaml"
    before, after = measured.state("before"), measured.state("after")
    both = [name for name in after if name in before]
    kinds = {"abft": "ABFT", "end_to_end": "End to end", "read_out": "Read-out"}
    return {
        "title": f"{kinds.get(run.objective, run.objective)}: {run.title}",
        "run": run,
        "recipe_text": recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        "measured": measured,
        "shared": (before[both[0]], after[both[0]], both[0]) if both else None,
        "methods": [
            (who, name, methods[name])
            for name in dict.fromkeys([*before, *after])
            for who, methods in (("base", before), ("adapter", after))
            if name in methods
        ],
        "confused": _confused(measured.labels, after or before),
        "protocols": _protocols(run),
        "panel": panel(run.heads) if run.heads and not no_heads(run) else None,
        "sections": shown,
    }


def _confused(names: Sequence[str], methods: Mapping[str, Method]) -> list[str]:
    """The most frequent confusions of the first method that has a table of them."""
    tables = [np.array(method.confusion) for method in methods.values()]
    counts = next((t for t in tables if t.shape == 2 * (len(names),)), np.zeros((0, 0), int))
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS_SHOWN]
    pairs = [np.unravel_index(at, wrong.shape) for at in order if wrong.flat[at]]
    return [f"{names[row]} taken for {names[column]}: {wrong[row, column]:,}"
            for row, column in pairs]  # fmt: skip


def _protocols(run: RunData) -> dict[str, Any] | None:
    """What other protocols measured, number by number."""
    rows = []
    for part in ("robustness", "bias", "unseen", "transfer"):
        sides = [
            dict(_leaves(getattr(side, part))) if side else {}
            for side in (run.evaluation.base, run.evaluation)
        ]
        for key in dict.fromkeys([*sides[1], *sides[0]]):
            name = ": ".join((part, *key)).replace("_", " ")
            rows.append([name, *(f"{side[key]:.4g}" if key in side else NOTHING for side in sides)])
    return _table(rows, ["", "base", "adapter"], "Other protocols") if rows else None


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], float]]:
    """The numbers inside nested objects, with the way to each."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in _leaves(part, (*keys, str(key)))]
    return [(keys, value)] if type(value) in (int, float) else []


def _study_page(source: Path, draw: Draw) -> dict[str, Any]:
    """What the template shows of a study."""
    facts, _ = study_facts(source)
    drawing = study_drawing(facts, source)
    figures = draw(drawing, drawing.figures)
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
    charts = Section("figures", "Figures", [], figures, drawing.notes)
    return {
        "title": f"Study {facts.name}",
        "facts": facts,
        "lead": intro(facts),
        "counts": {
            name: len({getattr(cell, key) for cell in facts.cells} - {None})
            for name, key in (("model", "model"), ("task", "task"), ("method", "method"),
                              ("training seed", "seed"))
        },
        "panel": None,
        "sections": [
            *tables[:1], charts, *tables[1:], Section("cells", "Cells"),
            Section("reproduce", "How to make it again"),
        ],
    }  # fmt: skip


def panel(heads: Heads) -> dict[str, Any]:
    """The map of heads and the prompts: texts for the template, ``data`` for the script."""
    states = list(heads.states.values())
    tables: dict[str, dict[str, np.ndarray]] = {}
    for key in MEASURES:
        values = {
            name: getattr(state, key, getattr(state.detected, key, None))
            for name, state in heads.states.items()
        }
        known = {name: table for name, table in values.items() if table is not None}
        if key == "weight" and known:
            # The state before has none: there the LM head answers.
            known = dict.fromkeys(values, list(known.values())[-1])
        if len(known) == len(values):
            tables[key] = known
    # The first head: whose correctness changed most, or that looks at labels most.
    change = states[-1].correctness - states[0].correctness
    first = np.nanargmax(abs(change) if len(states) > 1 else states[0].magnitude)
    layers, count = states[0].magnitude.shape
    data = {
        "layers": layers,
        "heads": count,
        "prompts": heads.prompts,
        "states": list(heads.states),
        "start": int(first),
        "measures": {
            key: {
                "name": MEASURES[key][0],
                "what": MEASURES[key][1],
                "mean": key in ("magnitude", "correctness", "share", "sink"),
                "signed": key in ("correctness", "weight"),
                "values": {state: _numbers(table, 5) for state, table in by_state.items()},
            }
            for key, by_state in tables.items()
        },
        "examples": [_example_data(example) for example in heads.examples],
    }
    return {"data": data, "examples": [_example_texts(heads, one) for one in heads.examples]}


def _example_data(example: Example) -> dict[str, Any]:
    """Attention on a prompt: compressed uint8 (L, H, T), and what a step is worth (L, H)."""
    states = {}
    for name, rows in example.rows.items():
        scales = np.round(rows.max(axis=-1).astype(np.float64) / LEVELS, 9)
        steps = np.nan_to_num(rows) / np.where(scales > 0, scales, 1.0)[..., None]
        content = np.clip(np.rint(steps), 0, LEVELS).astype(np.uint8).tobytes()
        at = rows[:, :, example.label_positions].astype(np.float64)
        states[name] = {
            "rows": base64.b64encode(zlib.compress(content, 9)).decode("ascii"),
            "scales": _numbers(scales, 9),
            "right": _numbers(at[:, :, example.right].sum(axis=-1), 5),
            "wrong": _numbers(at[:, :, ~example.right].sum(axis=-1), 5),
        }
    positions = example.label_positions.tolist()
    return {"tokens": len(example.tokens), "labels": positions, "states": states}


def _example_texts(heads: Heads, example: Example) -> dict[str, Any]:
    """A prompt's texts, and whether each label is the gold one."""
    right = dict(zip(example.label_positions.tolist(), example.right.tolist(), strict=True))
    return {
        "gold": heads.labels[example.gold],
        "demonstrations": [
            (heads.labels[label], mark)
            for label, mark in zip(example.demonstration_labels, example.right, strict=True)
        ],
        # White space can be seen.
        "tokens": [
            (token.replace("\t", "⇥\t").replace("\n", "⏎\n") or "∅", right.get(n))
            for n, token in enumerate(example.tokens)
        ],
        "states": list(example.rows),
    }


def _numbers(table: np.ndarray, digits: int) -> list[float | None]:
    """A table row by row, rounded, None for NaN."""
    rounded = np.round(table.astype(np.float64), digits).ravel().tolist()
    return [None if np.isnan(value) else value for value in rounded]
