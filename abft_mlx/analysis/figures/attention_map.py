"""What heads look at from the last position, token by token (the paper's figures 8 and 16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts, ticks

RIGHT, WRONG = "label equal to the gold one", "other label"
QUERY_TOKENS = 6
ROW_INCHES = 0.13


def height(rows: int) -> float:
    """Inches that a map of so many heads needs."""
    return max(0.5, ROW_INCHES * rows)


def draw(
    axes: Any,
    rows: np.ndarray,
    tokens: Sequence[str],
    label_positions: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
) -> Any:
    """Heads by tokens; the colour is the square root of the attention, so that little is seen too.

    Where not all tokens have room, the labels, the last tokens and some between are named.

    Args:
        axes: a matplotlib Axes.
        rows: (R, T) attention of the last position, NaN for a head that is not there.
        tokens: T texts.
        label_positions: (K,) of the demonstrations' label tokens.
        right: (K,) bool, the label equals the gold one.
        names: of the R heads.

    Returns:
        ``axes``.
    """
    return rows_over_tokens(axes, rows, tokens, label_positions, right, names, last=True)


def rows_over_tokens(
    axes: Any,
    rows: np.ndarray,
    tokens: Sequence[str],
    label_positions: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
    *,
    last: bool,
    first: bool = True,
) -> Any:
    """As :func:`draw`, for a panel among others: only the last has tokens, the first a legend."""
    from matplotlib.colors import PowerNorm
    from matplotlib.transforms import offset_copy

    image = axes.imshow(
        np.ma.masked_invalid(rows), aspect="auto", interpolation="none", cmap=style.COLOUR_MAP,
        norm=PowerNorm(0.5, vmin=0, vmax=1),
    )  # fmt: skip
    above = offset_copy(axes.get_xaxis_transform(), axes.figure, y=4, units="points")
    handles = []
    for chosen, mark, shade, name in (
        (right, "v", style.colour(0), RIGHT),
        (~right, "x", style.colour(1), WRONG),
    ):
        where = np.asarray(label_positions)[np.asarray(chosen, dtype=bool)]
        handles += axes.plot(
            where, np.full(len(where), 1.0), mark, color=shade, markersize=4, clip_on=False,
            transform=above, label=name, linestyle="none",
        )  # fmt: skip
    for one in handles:  # without points its place would be the figure's corner
        one.set_in_layout(False)
    axes.set_xlim(-0.5, len(tokens) - 0.5)
    places = _named(axes, len(tokens), label_positions) if last else []
    axes.set_xticks(
        places, [texts.token(tokens[one]) for one in places], rotation=90,
        fontsize=style.SMALL_POINTS,
    )  # fmt: skip
    heads = ticks.every(axes, names, vertical=True)
    axes.set_yticks(
        heads, [texts.short(names[one], 20) for one in heads], fontsize=style.SMALL_POINTS
    )
    axes.tick_params(length=2)
    if last:
        axes.set_xlabel("token of the prompt")
    bar = style.colour_bar(axes, image, "attention (share)")
    bar.set_ticks([0, 0.1, 0.5, 1] if style.axes_inches(axes)[1] > 0.8 else [0, 0.25, 1])
    if first:
        style.legend(axes, handles)
        axes.get_legend().set_bbox_to_anchor((0, 1 + 0.12 / style.axes_inches(axes)[1]))
    return axes


def _named(axes: Any, count: int, label_positions: np.ndarray) -> list[int]:
    query = list(range(count - 1, max(count - 1 - QUERY_TOKENS, -1), -1))
    wanted = [count - 1, *(int(one) for one in label_positions), 0, *query]
    return ticks.chosen(count, ticks.room(axes), wanted)
