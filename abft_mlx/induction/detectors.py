"""The classic detectors of heads, on repeated random tokens (Olsson et al., arXiv 2209.11895).

A row is a start token, N random tokens, and the same N tokens again. From a position of the second
half, a previous-token head looks one token back, a duplicate-token head at the same token in the
first half (N back), and an induction head at the token behind that (N - 1 back), which comes next.
Letters: B rows, L layers, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import attention
from abft_mlx.errors import UsageError

SEQUENCES, REPEATED_TOKENS, BATCH = 128, 50, 16


@dataclass(frozen=True)
class Detected:
    """What the detectors found; all arrays (L, H) float64 in 0..1, NaN for layers without heads.

    Attributes:
        previous_token: attention on the token before.
        duplicate_token: attention on the same token's earlier occurrence.
        induction: attention on the token behind that occurrence.
        sequences: random rows looked at, each at one position.
        repeated_tokens: N.
    """

    previous_token: np.ndarray
    duplicate_token: np.ndarray
    induction: np.ndarray
    sequences: int
    repeated_tokens: int


def repeated_rows(
    vocabulary: np.ndarray, start: int | None, sequences: int, repeated_tokens: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of random tokens that come twice, and the position that each is looked at from.

    Args:
        vocabulary: (V,) token ids to draw from.
        start: a token that begins every row, or None.
        sequences: B.
        repeated_tokens: N, all different within a row.
        seed: of tokens and positions.

    Returns:
        (B, 2 N), or one longer with ``start``, and (B,) positions in the second half; int32.

    Raises:
        UsageError: too few tokens for rows without accidental repeats.
    """
    N = repeated_tokens
    if N < 3 or len(vocabulary) < N or sequences < 1:
        raise UsageError(
            f"repeated random tokens: {sequences} rows of {N} tokens out of {len(vocabulary)} "
            "cannot be drawn; at least 1 row of 3 tokens, all different, is needed; or leave the "
            "detectors out"
        )
    rng = np.random.default_rng(seed)
    halves = np.stack([rng.choice(vocabulary, N, replace=False) for _ in range(sequences)])
    lead = np.full((sequences, 0 if start is None else 1), start or 0)
    tokens = np.concatenate([lead, halves, halves], axis=1).astype(np.int32)
    last = lead.shape[1] + N + rng.integers(N, size=sequences)
    return tokens, last.astype(np.int32)


def detect(
    model: nn.Module,
    vocabulary: np.ndarray,
    *,
    start: int | None = None,
    sequences: int = SEQUENCES,
    repeated_tokens: int = REPEATED_TOKENS,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Detected:
    """Score every head on repeated random tokens.

    Every row is looked at from one position of its second half, drawn evenly, so that the means are
    over positions and rows at once and only last rows are ever computed.

    Args:
        model: a loaded model.
        vocabulary: (V,) token ids to draw from, special ones left out.
        start: a token that begins every row, as the model's prompts begin, or None.
        sequences: random rows.
        repeated_tokens: N, at least 3, with as many different tokens in ``vocabulary``.
        seed: of tokens and positions.
        on_progress: called with the numbers of rows done and of all.

    Raises:
        UsageError: too few tokens for rows without accidental repeats.
    """
    N = repeated_tokens
    tokens, last = repeated_rows(vocabulary, start, sequences, N, seed)
    back = np.array([1, N, N - 1])
    sums: list[np.ndarray | None] = []
    for first in range(0, sequences, BATCH):
        part = slice(first, first + BATCH)
        rows = attention.capture(model, tokens[part], last[part])
        sums = sums or [None] * len(rows)
        seen = mx.array(last[part, None] - back[None, :])
        for layer, row in enumerate(rows):
            if row is None:
                continue
            positions = mx.broadcast_to(seen[:, None, :], (*row.shape[:2], len(back)))
            mass = mx.take_along_axis(row, positions, axis=-1).sum(axis=0)
            before = sums[layer]
            sums[layer] = np.asarray(mass, dtype=np.float64) + (0 if before is None else before)
        if on_progress is not None:
            on_progress(min(first + BATCH, sequences), sequences)
    width = max((len(heads) for heads in sums if heads is not None), default=0)
    table = np.full((len(back), len(sums), width), math.nan)
    for layer, heads in enumerate(sums):
        if heads is not None:
            table[:, layer, : len(heads)] = heads.T / sequences
    previous, duplicate, induction = table
    return Detected(previous, duplicate, induction, sequences, N)
