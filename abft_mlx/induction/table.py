"""Heads as rows of a table, and how well the two notions of an induction head agree."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx import files
from abft_mlx.induction.saved import CENSUS, DETECTED, Heads, HeadState

COLUMNS = ("state", "layer", "head", *CENSUS, *DETECTED, "weight")


def rows(heads: Heads) -> list[dict[str, Any]]:
    """One row for each head in each state, layers without heads left out.

    Args:
        heads: what was seen.

    Returns:
        Dictionaries with the keys of ``COLUMNS``; None for detectors that were not asked for,
            and for weights of a model that answers with its LM head.
    """
    table = []
    for name, state in heads.states.items():
        for layer, head in np.argwhere(~np.isnan(state.magnitude)).tolist():
            values = {part: float(array[layer, head]) for part, array in state.tables.items()}
            row = {"state": name, "layer": layer, "head": head} | values
            table.append({column: row.get(column) for column in COLUMNS})
    return table


def write_csv(path: Path, heads: Heads) -> None:
    """Write :func:`rows` as CSV, whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
        RunError: the disk is full.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(heads))
    files.write_text(path, text.getvalue())


@dataclass(frozen=True)
class Agreement:
    """Whether heads that look at labels are those that continue repeated random tokens.

    Attributes:
        rank_correlation: Spearman's, over all heads, of magnitude and induction score, in -1..1;
            NaN where one of them is the same in all heads.
        count: n, heads that pass the filter in at least half of the prompts.
        shared: of the n heads of highest induction score, how many are among these.
        by_chance: how many would be if the scores were drawn by lot, n² / all.
    """

    rank_correlation: float
    count: int
    shared: int
    by_chance: float


def agreement(state: HeadState) -> Agreement | None:
    """Compare the paper's notion of an induction head with the classic one.

    Returns:
        None where no detectors were asked for.
    """
    if state.detected is None:
        return None
    known = ~np.isnan(state.magnitude)
    magnitude, induction = state.magnitude[known], state.detected.induction[known]
    ours = state.share[known] >= 0.5
    count = int(ours.sum())
    best = np.argsort(-induction, kind="stable")[:count]
    return Agreement(
        _spearman(magnitude, induction), count, int(ours[best].sum()), count**2 / len(ours)
    )


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, NaN where one of the two is constant."""
    ranks = [_ranks(values) for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2)[where]
