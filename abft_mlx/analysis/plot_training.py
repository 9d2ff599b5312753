"""Training curves of a study, over tasks and seeds."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import training_curves
from abft_mlx.analysis.measurements import Measurement, rows
from abft_mlx.analysis.paper import Paper
from abft_mlx.analysis.plotting import Plot, by_model, caption, stem
from abft_mlx.analysis.run_facts import ABFT, ABFT_ONLY, CURVES

LINES = 8


def training(_document: dict[str, Any], found: list[Measurement], _paper: Paper) -> list[Plot]:
    """Loss, its terms, heads and A against prompts seen, a line for each method."""
    made = []
    trained = [one for one in found if one.plain and (one.cell.get("run") or {}).get("curve")]
    # Beside swept settings the plain methods are the figure; alone, the sweep is.
    unswept = [one for one in trained if not one.sweep]
    for model, some in by_model(unswept or trained):
        every = list(rows(some).values())
        grouped = every[:LINES]
        read = [_curves(group) for group in grouped]
        means = [middle for _, middle, _ in read]
        draw = partial(
            training_curves.draw,
            seen=[seen for seen, _, _ in read],
            curves=means,
            names=[group[0].label for group in grouped],
            spread=[around for _, _, around in read],
        )
        more = "bands are one standard deviation over tasks and seeds"
        if len(every) > LINES:
            more += f"; the first {LINES} of {len(every)} settings"
        if any(_label_loss(group[0]) for group in grouped):
            more += "; the loss of methods other than ABFT is the cross-entropy of the label"
        height = partial(_height, curves=means)
        made.append(Plot(stem("training", model), draw, caption(model, some, more), height))
    return made


def _height(_across: float, curves: list[dict[str, np.ndarray]]) -> float:
    return training_curves.height(curves)


def _curves(
    group: list[Measurement],
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Prompts seen (U,), and means and spreads (U,) over runs, as far as all runs went."""
    runs = [one.cell["run"]["curve"] for one in group]
    length = min(len(run) for run in runs)
    seen = np.array([step["seen_examples"] for step in runs[0][:length]], dtype=np.float64)
    middle, around = {}, {}
    for name in CURVES:
        if name in ABFT_ONLY and _label_loss(group[0]):
            continue
        if not all(name in step for run in runs for step in run[:length]):
            continue
        values = np.array([[step[name] for step in run[:length]] for run in runs], dtype=np.float64)
        middle[name] = values.mean(axis=0)
        around[name] = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(length)
    return seen, middle, around


def _label_loss(one: Measurement) -> bool:
    return (one.cell.get("settings") or {}).get("objective") not in (None, ABFT)
