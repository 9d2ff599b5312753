"""Several states of a model over one prompt: pre-trained, ABFT, end to end (figures 8 and 16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import attention_map, style, texts

GAP_INCHES = 0.2


def height(rows: int, states: int) -> float:
    """Inches that maps of so many heads in so many states need."""
    return attention_map.height(rows) * states + GAP_INCHES * (states - 1)


def draw(
    axes: Any,
    states: Sequence[np.ndarray],
    tokens: Sequence[str],
    label_positions: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
    state_names: Sequence[str],
) -> Any:
    """A map of heads by tokens for each state, one above the other over the same tokens.

    Args:
        axes: a matplotlib Axes, which is divided into panels (``axes.child_axes``).
        states: for each state (R, T) attention of the last position, the same heads in all.
        tokens: T texts.
        label_positions: (K,) of the demonstrations' label tokens.
        right: (K,) bool, the label equals the gold one.
        names: of the R heads.
        state_names: of the states.

    Returns:
        ``axes``.
    """
    made = style.panels(axes, [1] * len(states), gaps=GAP_INCHES)
    for index, (panel, rows, name) in enumerate(zip(made, states, state_names, strict=True)):
        attention_map.rows_over_tokens(
            panel, rows, tokens, label_positions, right, names,
            last=index == len(made) - 1, first=index == 0,
        )  # fmt: skip
        panel.set_ylabel(texts.short(name, 20))
    return axes
