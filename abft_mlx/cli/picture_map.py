"""A layer × head map in block letters: what every head gives right labels more than wrong ones.

Letters: L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Where each shade begins; the same for right and for wrong labels.
STEPS = (0.05, 0.1, 0.2, 0.4)
RIGHT, WRONG = " ░▒▓█", " -=≡#"
RIGHT_ASCII, WRONG_ASCII = " .:+@", " -=%#"
NONE, FAINT = " ", "·"
_MOST_ROWS = 16
_GAP = 3


@dataclass(frozen=True)
class HeadMap:
    """A map of each state, cut to what can be shown.

    Attributes:
        layers: the layers that are shown, in order.
        cells: for each state's name (rows, columns) values; NaN where there is no head.
        heads_per_cell: heads that share a column; the value is that farthest from 0.
        left_out: layers with heads that are not shown.
    """

    layers: tuple[int, ...]
    cells: Mapping[str, np.ndarray]
    heads_per_cell: int
    left_out: int


def fit(
    values: Mapping[str, np.ndarray], share: Mapping[str, np.ndarray], width: int
) -> HeadMap | None:
    """Cut maps to a width and to a few rows.

    Where there are too many layers, those are shown in which some head passes the filter, and of
    these the ones that change most; of one state, those whose heads have the largest values.

    Args:
        values: for each state (L, H).
        share: likewise; the share of prompts in which the head passes the filter.
        width: columns of the terminal.

    Returns:
        None where there is no head at all.
    """
    tables = list(values.values())
    present = np.isfinite(tables[0]).any(axis=1)
    layers = np.flatnonzero(present)
    if not len(layers):
        return None
    kept = layers
    if len(kept) > _MOST_ROWS:
        inducing = np.max([np.nan_to_num(one).max(axis=1) for one in share.values()], axis=0) > 0
        kept = np.flatnonzero(inducing & present) if (inducing & present).any() else kept
    if len(kept) > _MOST_ROWS:
        moved = tables[-1] - tables[0] if len(tables) > 1 else tables[0]
        order = np.argsort(-np.nan_to_num(abs(moved)).max(axis=1)[kept], kind="stable")
        kept = np.sort(kept[order[:_MOST_ROWS]])
    room = width - label_width(kept) - _GAP * (len(tables) - 1)
    heads = tables[0].shape[1]
    columns = max(1, room // len(tables))
    each = -(-heads // columns)
    return HeadMap(
        tuple(int(one) for one in kept),
        {name: _merged(one[kept], each) for name, one in values.items()},
        each,
        len(layers) - len(kept),
    )


def label_width(layers: Sequence[int] | np.ndarray) -> int:
    """Columns of a row's label, its space included."""
    return max(len("layer"), len(str(max(layers)))) + 1


def glyph(value: float, *, ascii_only: bool = False) -> str:
    """The block letter of a value."""
    if not np.isfinite(value):
        return NONE
    step = int(np.searchsorted(STEPS, abs(value), side="right"))
    if step == 0:
        return "'" if ascii_only else FAINT
    if value > 0:
        return (RIGHT_ASCII if ascii_only else RIGHT)[step]
    return (WRONG_ASCII if ascii_only else WRONG)[step]


def _merged(table: np.ndarray, each: int) -> np.ndarray:
    """(rows, H) to (rows, columns): of every few heads the value farthest from 0."""
    rows, heads = table.shape
    padded = np.full((rows, -(-heads // each) * each), np.nan)
    padded[:, :heads] = table
    groups = padded.reshape(rows, -1, each)
    size = np.where(np.isfinite(groups), abs(groups), -1.0)
    return np.take_along_axis(groups, size.argmax(axis=-1)[..., None], axis=-1)[..., 0]
