"""The page of a study: its tables, its figures, what failed, and what each cell is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abft_mlx.analysis.measurements import measurements
from abft_mlx.analysis.report import figures, html, markdown
from abft_mlx.analysis.report.html import Markup, element, join, table
from abft_mlx.analysis.report.page import Data, Section, page
from abft_mlx.analysis.report.results import rate
from abft_mlx.analysis.tables import table_md
from abft_mlx.analysis.text import NOTHING

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


def study_page(
    document: dict[str, Any], drawings: Markup = html.NOTHING, untold: Sequence[str] = ()
) -> tuple[str, list[str], list[str]]:
    """The page, its sections' titles, and notes on what is missing.

    Args:
        document: from :func:`abft_mlx.analysis.facts.facts`.
        drawings: matplotlib's figures.
        untold: notes on figures that are not among them.
    """
    lead, made = markdown.sections(table_md(document))
    found = [*made[:1], *figures.section(drawings, untold), *made[1:]]
    found += [
        Section("methods", "What each method is", _methods(document)),
        Section("cells", "Cells", _cells(document)),
        Section("reproduce", "How to make it again", _reproduce(document)),
    ]
    text = page(
        f"Study {document['name']}", join(*lead, _overview(document)), found, Data()
    )  # fmt: skip
    return text, [one.title for one in found], list(untold)


def _overview(document: dict[str, Any]) -> Markup:
    cells = document["cells"]
    models = dict.fromkeys(str(one["model"]) for one in cells)
    tasks = dict.fromkeys(str(one["task"]) for one in cells)
    methods = dict.fromkeys(str(one["method"]) for one in cells)
    seeds = {one["seed"] for one in cells if one["seed"] is not None}
    failed = document["failed"]
    told = (
        f"{_many(len(cells), 'cell')} done: {_many(len(models), 'model')} "
        f"({', '.join(models) or 'none'}), {_many(len(tasks), 'task')}, "
        f"{_many(len(methods), 'method')}, {_many(len(seeds), 'training seed')}."
    )
    wrong = None
    if failed:
        wrong = element(
            "p", element("strong", f"{_many(len(failed), 'cell')} failed"), "; ",
            element("a", "which, and why", href="#failed-cells"), ".", class_="warning",
        )  # fmt: skip
    return join(element("p", told), wrong)


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _methods(document: dict[str, Any]) -> Markup:
    rows: list[list[Any]] = []
    seen = dict.fromkeys(one.method for one in measurements(document))
    like = {str(one["method"]): str(one["like"]) for one in document["cells"]}
    for name in seen:
        base, _, more = name.partition(" + ")
        what = _METHODS.get(base)
        if what is None and like.get(base) in _METHODS:
            what = f"as {like[base]} ({_METHODS[like[base]]}), with settings of the study's own"
        rows.append([name, (what or NOTHING) + (f"; then {more}" if more else "")])
    return table(["method", "what it is"], rows, name="methods")


def _cells(document: dict[str, Any]) -> Markup:
    rows = []
    for one in document["cells"]:
        methods = one["evaluation"].get("methods") or {}
        told = ", ".join(
            f"{name} {rate(values.get('accuracy'))}" for name, values in methods.items()
        )
        seconds = one.get("seconds")
        rows.append(
            [one["id"], told or NOTHING, NOTHING if seconds is None else f"{seconds:,.0f}"]
        )  # fmt: skip
    made = table(["cell", "accuracy", "seconds"], rows, name="cells that are done")
    return element("details", element("summary", _many(len(rows), "cell")), made)


def _reproduce(document: dict[str, Any]) -> Markup:
    name = str(document["name"])
    return element(
        "p", "A study that ships with abft-mlx runs by its name, another by its file: ",
        element("code", f"abft-mlx study {name} --output DIR"),
        "; then ", element("code", "abft-mlx report DIR"), ".",
    )  # fmt: skip
