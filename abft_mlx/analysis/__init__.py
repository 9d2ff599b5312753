"""Tables and figures of studies and runs, from their files; nothing is trained or measured here.

What reads studies and runs is imported when it is first asked for: a figure's arrays need no model,
so :mod:`abft_mlx.analysis.figures` must not be what brings MLX in before its BLAS is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abft_mlx.analysis.drawing import Figure, Seen, draw, look
    from abft_mlx.analysis.plots import check
    from abft_mlx.analysis.plots import names as figure_names
    from abft_mlx.analysis.run_plots import run_figure_names
    from abft_mlx.analysis.writing import Written, write_study

__all__ = [
    "Figure",
    "Seen",
    "Written",
    "check",
    "draw",
    "figure_names",
    "look",
    "run_figure_names",
    "write_study",
]

_HOMES = {
    "Figure": ("drawing", "Figure"),
    "Seen": ("drawing", "Seen"),
    "draw": ("drawing", "draw"),
    "look": ("drawing", "look"),
    "run_figure_names": ("run_plots", "run_figure_names"),
    "Written": ("writing", "Written"),
    "check": ("plots", "check"),
    "figure_names": ("plots", "names"),
    "write_study": ("writing", "write_study"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562)."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'abft_mlx.analysis' has no attribute {name!r}")
    module, inside = _HOMES[name]
    value = getattr(import_module(f"abft_mlx.analysis.{module}"), inside)
    globals()[name] = value
    return value
