"""Figures of what happens inside: heads while training, moved weights, attention on labels."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import head_count as head_count_figure
from abft_mlx.analysis.figures import label_attention, shift
from abft_mlx.analysis.measurements import Measurement, rows
from abft_mlx.analysis.paper import Paper
from abft_mlx.analysis.plotting import Plot, by_model, caption, stem
from abft_mlx.analysis.run_heads import over_heads
from abft_mlx.analysis.table_csv import heads_of


def head_count(_document: dict[str, Any], found: list[Measurement], _paper: Paper) -> list[Plot]:
    """Heads against prompts seen, a line for each method, for each model."""
    made = []
    counted = [one for one in found if one.plain and heads_of(one.cell)]
    # Beside a grid of settings the plain methods are the figure; alone, the grid is.
    unswept = [one for one in counted if not one.sweep]
    for model, some in by_model(unswept or counted):
        grouped = list(rows(some).values())
        curves = [_curves(group) for group in grouped]
        draw = partial(
            head_count_figure.draw,
            seen=[seen for seen, _ in curves],
            heads=[heads.mean(axis=0) for _, heads in curves],
            spread=[_spread(heads) for _, heads in curves],
            methods=[group[0].label for group in grouped],
        )
        more = "bands are one standard deviation over tasks and seeds"
        made.append(Plot(stem("head-count", model), draw, caption(model, some, more)))
    return made


def _curves(group: list[Measurement]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts seen (U,) and heads (runs, U), as far as all runs went."""
    runs = [heads_of(one.cell) for one in group]
    length = min(len(run) for run in runs)
    curve = group[0].cell["run"]["curve"][:length]
    seen = np.array([step["seen_examples"] for step in curve], dtype=np.float64)
    return seen, np.array([run[:length] for run in runs])


def shifts(_document: dict[str, Any], found: list[Measurement], _paper: Paper) -> list[Plot]:
    """Norms of the change of W_Q and W_K in every layer, for each model."""
    made = []
    for model, some in by_model(one for one in found if one.plain and one.cell.get("shift")):
        names, middle, around = [], [], []
        for group in rows(some).values():
            for part in ("q", "k"):
                norms = np.array([one.cell["shift"][part] for one in group], dtype=np.float64)
                names.append(f"{group[0].label} W_{part.upper()}")
                middle.append(norms.mean(axis=0))
                around.append(_spread(norms))
        draw = partial(shift.draw, shifts=middle, spread=around, names=names)
        more = "bands are one standard deviation over tasks and seeds"
        made.append(Plot(stem("shift", model), draw, caption(model, some, more)))
    return made


def label_attention_lines(
    _document: dict[str, Any], found: list[Measurement], _paper: Paper
) -> list[Plot]:
    """Attention on labels in every layer, for each model and each state of it."""
    made = []
    for model, some in by_model(one for one in found if one.plain and one.cell.get("census")):
        names, on_labels, on_gold = [], [], []
        for group in rows(some).values():
            magnitude, correctness = (
                np.nanmean([_by_layer(one, key) for one in group], axis=0)
                for key in ("magnitude", "correctness")
            )
            names.append("before" if group[0].method == "vanilla" else group[0].label)
            on_labels.append(magnitude)
            # Magnitude is right plus wrong, correctness right less wrong.
            on_gold.append((magnitude + correctness) / 2)
        draw = partial(label_attention.draw, on_labels=on_labels, on_gold=on_gold, names=names)
        more = (
            f"means over heads and the first {some[0].cell['census'].get('prompts', '?')} prompts"
        )
        made.append(Plot(stem("label-attention", model), draw, caption(model, some, more)))
    return made


def _by_layer(one: Measurement, key: str) -> np.ndarray:
    return over_heads(np.array(one.cell["census"][key], dtype=np.float64))


def _spread(runs: np.ndarray) -> np.ndarray:
    """Standard deviation over runs; 0 for one run."""
    return runs.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(runs.shape[1])
