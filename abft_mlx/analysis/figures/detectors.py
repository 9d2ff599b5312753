"""Two notions of induction head: attention on labels, and on what followed a repeated token."""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style


def draw(axes: Any, magnitude: np.ndarray, induction: np.ndarray) -> Any:
    """A point for every head, coloured by its layer.

    Args:
        axes: a matplotlib Axes.
        magnitude: (L, H) attention on the label tokens, NaN where there is no head.
        induction: (L, H) attention on the token behind the earlier occurrence, on repeated random
            tokens.

    Returns:
        ``axes``.
    """
    known = ~(np.isnan(magnitude) | np.isnan(induction))
    layers = np.broadcast_to(np.arange(len(magnitude))[:, None], magnitude.shape)
    points = axes.scatter(
        induction[known], magnitude[known], c=layers[known], cmap=style.COLOUR_MAP, s=16,
        vmin=0, vmax=max(1, len(magnitude) - 1), linewidths=0.4, edgecolors="black", clip_on=False,
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("induction on repeated random tokens\n(share of attention)")
    axes.set_ylabel("magnitude: attention\non labels (share)")
    bar = style.colour_bar(axes, points, "layer")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return axes
