"""Tables and figures from the cells of a study; nothing is trained or measured here.

What reads studies is imported when it is first asked for: a figure's arrays need no model, so
:mod:`abft_mlx.analysis.figures` must not be what brings MLX in before its BLAS is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abft_mlx.analysis.plots import check
    from abft_mlx.analysis.plots import names as figure_names
    from abft_mlx.analysis.writing import Written, write_study

__all__ = ["Written", "check", "figure_names", "write_study"]

_HOMES = {
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
    from abft_mlx.runtime import prepare

    prepare()
    module, inside = _HOMES[name]
    value = getattr(import_module(f"abft_mlx.analysis.{module}"), inside)
    globals()[name] = value
    return value
