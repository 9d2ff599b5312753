"""Accuracy over the factor of an adapter, which the paper left open beyond 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style
from abft_mlx.analysis.figures.lines import line


def draw(
    axes: Any,
    factors: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    chosen: np.ndarray,
) -> Any:
    """Mean accuracy on validation and test prompts, with a band of one standard deviation.

    Args:
        axes: a matplotlib Axes.
        factors: (F,).
        validation: (R, F) in 0..1, a row for each run.
        test: (R, F) in 0..1.
        chosen: (R,) factor that each run's validation prompts chose.

    Returns:
        ``axes``.
    """
    for index, (name, values) in enumerate((("validation", validation), ("test", test))):
        middle = 100 * values.mean(axis=0)
        around = 100 * values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(factors))
        line(axes, index, factors, middle, middle - around, middle + around, name)
    axes.axvline(1, color="black", linewidth=1, linestyle=":", label="as trained")
    height = np.full(len(chosen), 0.02)
    axes.plot(
        chosen, height, style.marker(2), color=style.colour(2), clip_on=False,
        transform=axes.get_xaxis_transform(), label="chosen on validation",
    )  # fmt: skip
    axes.set_xlabel("factor of the adapter")
    axes.set_ylabel("accuracy (%)")
    style.legend(axes)
    return axes
