"""The page of one run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from abft_mlx.analysis.report import attention, figures, recipe, results, summary, training
from abft_mlx.analysis.report.chart import Chart, draw
from abft_mlx.analysis.report.html import NOTHING, Markup, element, join
from abft_mlx.analysis.report.page import Data, Section, notes, page
from abft_mlx.analysis.run_files import RunFiles

NO_EVALUATION = "the result on test prompts: abft-mlx eval --adapter RUN measures it"
NO_HEADS = "attention and heads: abft-mlx heads RUN looks at them"


def run_page(
    run: RunFiles, drawings: Markup = NOTHING, untold: Sequence[str] = ()
) -> tuple[str, list[str], list[str]]:
    """The page, its sections' titles, and notes on what is missing.

    Args:
        run: its files.
        drawings: matplotlib's figures.
        untold: notes on figures that are not among them.
    """
    data = Data()
    missing: list[str] = []
    found = [
        Section("result", "Result", _result(run, data, missing)),
        Section("attention", "Attention over the prompts", _attention(run, data, missing)),
        Section("training", "Training", _training(run, data, missing)),
        Section("layers", "Layer by layer", _layers(run, data, missing)),
        *figures.section(drawings, untold),
        Section("recipe", "Recipe", recipe.recipe(run)),
        Section("made-with", "Made with", recipe.made_with(run)),
        Section("reproduce", "How to make it again", recipe.reproduce()),
    ]
    text = page(summary.title(run), summary.summary(run), found, data)
    return text, [one.title for one in found], [*missing, *untold]


def _charts(charts: list[Chart], data: Data) -> Markup:
    return element("div", *(data.chart(draw(one)) for one in charts), class_="charts")


def _miss(note: str, missing: list[str]) -> Markup:
    missing.append(note)
    return join(notes([f"Not here: {note}."]))


def _result(run: RunFiles, data: Data, missing: list[str]) -> Markup:
    if not results.measured(run):
        return join(_validation(run), _miss(NO_EVALUATION, missing))
    other = results.other_numbers(run)
    line = results.headline(run)
    reliable = results.reliabilities(run)
    return join(
        None if line is None else element("p", line, class_="headline"),
        results.measures_table(run),
        results.how_measured(run),
        element(
            "div",
            *results.confusions(run),
            *(data.chart(draw(one)) for one in reliable),
            class_="beside",
        ),
        None if other is None else element("details", element("summary", "Other protocols"), other),
    )


def _validation(run: RunFiles) -> Markup | None:
    said = summary.validation(run)
    return None if said is None else element("p", said, class_="headline")


def _attention(run: RunFiles, data: Data, missing: list[str]) -> Markup:
    if run.heads is None:
        return _miss(NO_HEADS, missing)
    if all(np.isnan(one.magnitude).all() for one in run.heads.states.values()):
        return _miss("attention and heads: no layer of this model has heads to look at", missing)
    content, data.heads = attention.panel(run.heads)
    return content


def _training(run: RunFiles, data: Data, missing: list[str]) -> Markup:
    made = training.curves(run)
    if not made:
        return _miss("training curves: metrics.jsonl is empty or was not written", missing)
    return _charts(made, data)


def _layers(run: RunFiles, data: Data, missing: list[str]) -> Markup:
    shift = training.shift(run)
    attended = None if run.heads is None else training.label_attention(run.heads)
    made = [one for one in (attended, shift) if one is not None]
    note = None
    if shift is None:
        note = _miss("the shift of W_Q and W_K: run.json of a finished run holds it", missing)
    return join(_charts(made, data) if made else None, note)
