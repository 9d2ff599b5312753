"""What happens while training: loss, its terms, heads, A, validation (the paper's figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts
from abft_mlx.analysis.figures.lines import line

# Panels from the top: what is drawn, its label, and what it is multiplied by.
PANELS: tuple[tuple[str, str, float], ...] = (
    ("loss", "loss", 1.0),
    ("punish", "punish term\n(attention)", 1.0),
    ("reward", "reward term\n(attention)", 1.0),
    ("induction_heads", "induction heads\nin a prompt", 1.0),
    ("A", "punish\nweight A", 1.0),
    ("validation_accuracy", "validation\naccuracy (%)", 100.0),
)

Curves = Mapping[str, np.ndarray]


def quantities(curves: Sequence[Curves]) -> list[str]:
    """Those for which some run has a number: one panel each."""
    return [
        name
        for name, _, _ in PANELS
        if any(name in run and not np.isnan(run[name]).all() for run in curves)
    ]


def height(curves: Sequence[Curves]) -> float:
    """Inches that the panels of these runs need."""
    return 0.75 * max(1, len(quantities(curves)))


def draw(
    axes: Any,
    seen: Sequence[np.ndarray],
    curves: Sequence[Curves],
    names: Sequence[str],
    spread: Sequence[Curves] | None = None,
) -> Any:
    """A panel for each quantity over the prompts seen, a line in it for each run.

    Args:
        axes: a matplotlib Axes, which is divided into panels (``axes.child_axes``).
        seen: for each run (U,) training prompts seen after each update.
        curves: for each run (U,) arrays by name: ``loss``, ``punish``, ``reward``,
            ``induction_heads``, ``A``, ``validation_accuracy`` in 0..1; NaN where not measured; a
            quantity that a run does not have is left out.
        names: of the runs.
        spread: as ``curves``, half the height of a band around each line.

    Returns:
        ``axes``.
    """
    shown = quantities(curves)
    made = style.panels(axes, [1] * max(1, len(shown)), gaps=0.09)
    parts = {name: (label, factor) for name, label, factor in PANELS}
    for panel, quantity in zip(made, shown, strict=False):
        label, factor = parts[quantity]
        for index, run in enumerate(curves):
            if quantity not in run:
                continue
            known = ~np.isnan(run[quantity])
            middle, low, high = factor * run[quantity][known], None, None
            if spread is not None and quantity in spread[index]:
                around = factor * spread[index][quantity][known]
                low, high = middle - around, middle + around
            line(
                panel, index, seen[index][known], middle, low, high, texts.name(names[index]),
                markers=quantity == "validation_accuracy" or len(middle) == 1,
            )  # fmt: skip
        panel.set_ylabel(label, fontsize=style.SMALL_POINTS)
    for panel in made:
        panel.tick_params(labelbottom=panel is made[-1], labelsize=style.SMALL_POINTS)
        if panel is not made[-1]:
            panel.sharex(made[-1])
    made[-1].set_xlabel("training prompts seen")
    if len(curves) > 1:
        style.legend(made[0])
    return axes
