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
_MEASURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "expected_calibration_error": "calibration error (ECE)",
    "true_label_probability": "true-label probability",
}
_OBJECTIVES = {
    "abft": ("ABFT", "ABFT"),
    "end_to_end": ("End to end", "End-to-end fine-tuning"),
    "read_out": ("Read-out", "The label-attention read-out"),
}
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
    summary: str = ""


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
    environment.filters["percent"] = percent
    script, sheet = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("script.js", "style.css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    defaults = dict.fromkeys(
        ("description", "unfinished", "failures", "verdict", "gain", "measures", "confused",
         "protocols", "heads", "recipe", "data")
    )  # fmt: skip
    return environment.get_template("page.html").render(
        {
            **defaults, **context, "version": __version__, "generator": GENERATOR, "digest": digest,
            "script": Markup(script), "style": Markup(sheet),
        }
    )  # fmt: skip


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", name: str = "table"
) -> dict[str, Any]:
    """A table for the template; columns that hold words stand to the left."""
    number = re.compile(r"\s*([-+−–<]|\d|$)")
    words = [any(not number.match(row[n]) for row in rows) for n in range(len(header))]
    return {"header": header, "rows": rows, "caption": caption, "name": name, "words": words}


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
    shown["made-with"].blocks = [_made_with(run)]
    with_map = run.heads is not None and not drawable["label_attention"].missing
    heads = panel(run.heads) if with_map and run.heads else None
    kind, _ = _OBJECTIVES.get(run.objective, (run.objective, ""))
    measured = run.evaluation
    return {
        "title": f"{kind}: {run.title}",
        "description": run.recipe.description,
        "lead": [f"{_trained(run)} {_cost(run)}"],
        "unfinished": not run.run.finished,
        "verdict": measured and _verdict(measured),
        "gain": _gain(run),
        "measures": measured and _measures(measured, run),
        "confused": measured and _confused(measured),
        "protocols": measured and _protocols(measured),
        "heads": heads,
        "recipe": run.recipe_text.rstrip("\n"),
        "data": heads and heads["data"],
        "sections": list(shown.values()),
    }


def _trained(run: RunData) -> str:
    """What was trained, on what."""
    _, said = _OBJECTIVES.get(run.objective, ("", run.objective))
    parameters, adapter = run.run.trainable_parameters, run.recipe.adapter
    what = "an adapter" if parameters is None else f"{parameters:,} parameters"
    if adapter.get("kind") == "full":
        what += ", all of W_Q and W_K"
    elif "rank" in adapter:
        what += f", LoRA of rank {adapter['rank']} on W_Q and W_K"
    what += " and the LM head" if adapter.get("head") is True else ""
    k = run.recipe.prompt.get("demonstrations")
    labels = f" ({len(run.run.labels)} labels)" if run.run.labels else ""
    prompts = f", prompts of {k} demonstrations" if k else ""
    return f"{said} trained {what}, in the model {run.title}{labels}{prompts}."


def _cost(run: RunData) -> str:
    """How long it took, and how much memory."""
    totals = {
        key: value for key, value in run.run.totals.items() if isinstance(value, (int, float))
    }
    parts = []
    if "updates" in totals:
        seen = (
            f" of {totals['seen_examples']:,} prompts in all" if "seen_examples" in totals else ""
        )
        parts.append(f"{totals['updates']:,} updates{seen}")
    if "seconds" in totals:
        minutes = round(totals["seconds"] / 60)
        long = f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
        parts.append(f"{totals['seconds']:.3g} s" if totals["seconds"] < 120 else long)
    if "peak_memory_bytes" in totals:
        parts.append(f"{_size(totals['peak_memory_bytes'])} of MLX's memory at the peak")
    if totals.get("adapter_bytes"):
        parts.append(f"an adapter of {_size(totals['adapter_bytes'])}")
    device = f" ({run.run.device})" if run.run.device else ""
    return f"It took {', '.join(parts)}{device}." if parts else ""


def _size(count_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count_bytes >= factor:
            return f"{count_bytes / factor:.3g} {unit}"
    return f"{count_bytes:.0f} bytes"


def _gain(run: RunData) -> Markup | None:
    """What came of it, in one line: on test prompts, else on validation prompts."""
    strong = Markup("<strong>{} → {}</strong>")
    measured = run.evaluation or Evaluation()
    before, after = measured.state("before"), measured.state("after")
    for name, ours in after.items():
        if name in before:
            theirs = before[name]
            ends = ours.ends("accuracy")
            more = [f"95% interval with the adapter {_interval(ends)}"] if ends else []
            more += [f"n = {measured.prompts:,}"] if measured.prompts else []
            return Markup("Accuracy ({}) {}, {} points{}.").format(
                visible(name), strong.format(rate(theirs.accuracy), rate(ours.accuracy)),
                points(ours.accuracy - theirs.accuracy), f" ({', '.join(more)})" if more else "",
            )  # fmt: skip
    found = run.run.validation or {}
    if found.get("before") is None or found.get("after") is None:
        return None
    n = f" (n = {found['prompts']:,})" if found.get("prompts") else ""
    change = strong.format(rate(found["before"]), rate(found["after"]))
    return Markup("Validation accuracy {}{}.").format(change, n)


def rate(value: float | None) -> str:
    """A rate in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}%"


def _interval(ends: tuple[float, float]) -> str:
    """Both ends of an interval in percent."""
    return f"{100 * ends[0]:.1f}% to {100 * ends[1]:.1f}%"


def _verdict(measured: Evaluation) -> dict[str, Any] | None:
    """What a classifier is worth, beside prompting and simple baselines."""
    found = measured.verdict
    if found is None:
        return None
    common = measured.baselines.get("majority", {}).get("label")
    own = "with the adapter" if found.before is not None else "prompting"
    rows = [[own, rate(found.accuracy), _interval(found.interval) if found.interval else ""]]
    for name, value, note in (
        ("prompting", found.before, "the same demonstrations, no adapter"),
        ("bag of words", found.bag_of_words, "logistic regression, no model"),
        (f"always {common}", found.majority, "the most frequent label"),
    ):
        if value is not None:
            rows.append([name, rate(value), note])
    recall = ", ".join(f"{name} {rate(value)}" for name, value in found.recall.items())
    table = _table(
        ["", "accuracy", "95% interval, or what it is"], rows, f"On {found.n:,} test texts"
    )
    return {
        "sentence": found.sentence, "next": found.next, "table": table,
        "recall": f"Recall of each label: {recall}.",
    }  # fmt: skip


def _by_method(measured: Evaluation) -> list[tuple[str, str, Method]]:
    """(base or adapter, method, its numbers), method by method, the base first."""
    before, after = measured.state("before"), measured.state("after")
    return [
        (who, name, methods[name])
        for name in dict.fromkeys([*before, *after])
        for who, methods in (("base", before), ("adapter", after))
        if name in methods
    ]


def _measures(measured: Evaluation, run: RunData) -> dict[str, Any]:
    """Every measure with its interval, how it was measured, and the paired tests."""
    rows = []
    for who, name, method in _by_method(measured):
        cells = []
        for key in _MEASURES:
            ends = method.ends(key)
            cells.append((rate(getattr(method, key)), _interval(ends) if ends else ""))
        rows.append({"name": f"{who}, {name}", "cells": cells, "accuracy": method.accuracy,
                     "ends": method.ends("accuracy")})  # fmt: skip
    n, k, seed = measured.prompts, measured.k, measured.seed
    trained = run.recipe.training.get("seed")
    parts = [
        "test prompts" if n is None else f"n = {n:,} prompts",
        "" if k is None else f"{k} demonstrations each",
        "" if seed is None else f"test prompts and demonstrations drawn with seed {seed}",
        "" if trained is None else f"one training, with seed {trained}",
    ]
    how = [
        f"Measured on {'; '.join(filter(None, parts))}. The intervals are bootstrap percentiles "
        "over prompts; they do not say what another training seed would do."
    ]
    for test in measured.comparisons:
        first, second = (
            f"the base ({side.removeprefix('base.')})" if side.startswith("base.")
            else f"{'the adapter' if measured.base else 'the base'} ({side})"
            for side in (test.first, test.second)
        )  # fmt: skip
        p = p_value(test.p_value)
        how.append(
            f"{first[0].upper()}{first[1:]} against {second}, on the same prompts: "
            f"{test.only_first:,} right where the other is wrong, {test.only_second:,} the other "
            f"way round (exact McNemar test, p {p if p.startswith('<') else f'= {p}'})."
        )
    caption = "Measures with 95% intervals; the dots stand between 0 and 100%"
    return {"header": list(_MEASURES.values()), "rows": rows, "how": how, "caption": caption}


def _confused(measured: Evaluation) -> dict[str, Any] | None:
    """The most frequent confusions of the model with the adapter, or else of the base."""
    for who, name, method in reversed(_by_method(measured)):
        counts = method.counts(len(measured.labels))
        if counts is not None:
            wrong = counts - np.diag(np.diag(counts))
            order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS_SHOWN]
            pairs = [np.unravel_index(at, wrong.shape) for at in order if wrong.flat[at]]
            names = measured.labels
            lines = [f"{names[row]} taken for {names[column]}: {wrong[row, column]:,}"
                     for row, column in pairs]  # fmt: skip
            return {"of": f" ({who}, {name})", "lines": lines} if lines else None
    return None


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
    return _table(["", "base", "adapter"], rows, "Other protocols") if rows else None


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], float]]:
    """The numbers inside nested objects, with the way to each."""
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in _leaves(one, (*keys, str(key)))]
    return [(keys, value)] if type(value) in (int, float) else []


def _made_with(run: RunData) -> dict[str, Any]:
    """Versions, device, fingerprints and seeds."""
    made, texts = run.run, run.run.data
    rows: dict[str, Any] = {"versions": made.versions, "device": made.device,
                            "platform": made.platform}  # fmt: skip
    for part, source in (("model", made.model), ("data", texts)):
        at = f" at {source.revision}" if source.revision else ""
        rows[part] = source.source and short(source.source) + at
        rows[f"where the {part} came from"] = source.kind
        rows[f"fingerprint of the {part}"] = source.fingerprint
    rows |= {
        "seeds": made.seeds, "texts by class": texts.classes, "texts by use": texts.rows,
        "chat template": made.chat_template, "trained numbers": made.trainable_parameters,
    }  # fmt: skip
    shown = [
        [name, ", ".join(f"{key} {one:,}" if isinstance(one, int) else f"{key} {one}"
                         for key, one in value.items()) if isinstance(value, dict)
         else f"{value:,}" if isinstance(value, int) else value]
        for name, value in rows.items()
        if value
    ]  # fmt: skip
    return _table(["", "value"], shown, name="made with")


def _study_page(source: Path, drawer: _Drawer) -> dict[str, Any]:
    """What the template shows of a study."""
    facts, output = study_facts(source)
    seen = study_seen(source, facts, output)
    figures = [
        figure for name, plots in seen.figures.items() for figure in drawer.draw(name, plots)
    ]
    tables = [
        Section(
            re.sub(r"[^a-z0-9]+", "-", title.lower()),
            title,
            [block if isinstance(block, str) else _table(*block, name=title) for block in blocks],
        )
        for title, blocks in sections(facts)
    ]
    drawn = Section("figures", "Figures", [], figures, list(seen.notes) if drawer.wanted else [])
    cells = facts.cells
    lines = [
        [
            cell.id,
            ", ".join(f"{name} {rate(method.accuracy)}"
                      for name, method in cell.evaluation.methods.items()) or NOTHING,
            NOTHING if cell.seconds is None else f"{cell.seconds:,.0f}",
        ]
        for cell in cells
    ]  # fmt: skip
    shown = [
        *tables[:1],
        *([drawn] if drawn.figures or drawn.notes else []),
        *tables[1:],
        Section("methods", "What each method is", [_methods(facts)]),
        Section("cells", "Cells", [_table(["cell", "accuracy", "seconds"], lines, name="cells")],
                summary=_many(len(cells), "cell")),
        Section("reproduce", "How to make it again"),
    ]  # fmt: skip
    models = dict.fromkeys(cell.model for cell in cells)
    counts: dict[str, set[Any]] = {
        "task": {cell.task for cell in cells},
        "method": {cell.method for cell in cells},
        "training seed": {cell.seed for cell in cells} - {None},
    }
    overview = (
        f"{_many(len(cells), 'cell')} done: {_many(len(models), 'model')} "
        f"({', '.join(models) or 'none'}), "
        + ", ".join(_many(len(found), word) for word, found in counts.items())
        + "."
    )
    return {
        "title": f"Study {facts.name}",
        "name": facts.name,
        "lead": [*intro(facts), overview],
        "failures": _many(len(facts.failed), "cell") if facts.failed else None,
        "sections": shown,
    }


def _many(count: int, word: str) -> str:
    """A number with its word."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _methods(facts: Facts) -> dict[str, Any]:
    """What each method of a study is."""
    like = {cell.method: cell.like for cell in facts.cells}
    rows = []
    for name in dict.fromkeys(one.method for one in measurements(facts)):
        base, _, more = name.partition(" + ")
        what = _METHODS.get(base)
        if what is None and like.get(base) in _METHODS:
            what = f"as {like[base]} ({_METHODS[like[base]]}), with settings of the study's own"
        rows.append([name, (what or NOTHING) + (f"; then {more}" if more else "")])
    return _table(["method", "what it is"], rows, name="methods")
