"""Which prompts each update sees, and how an update is cut into micro-batches of few shapes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from abft_mlx.prompts import Prompt


@dataclass(frozen=True)
class MicroBatch:
    """Prompts of one micro-batch, right-padded; rows of weight 0 only fill the shape.

    Attributes:
        token_ids: (B, T) int32.
        last: (B,) int32 index of each prompt's last token.
        label_positions: (B, K) int32.
        demonstration_labels: (B, K) int32.
        gold: (B,) int32.
        weights: (B,) float32, 1 for a prompt and 0 for filling.
    """

    token_ids: np.ndarray
    last: np.ndarray
    label_positions: np.ndarray
    demonstration_labels: np.ndarray
    gold: np.ndarray
    weights: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.token_ids.shape[0], self.token_ids.shape[1]

    @property
    def prompts(self) -> int:
        """Prompts that count."""
        return int(self.weights.sum())

    @property
    def tokens(self) -> int:
        """Tokens of the prompts that count, padding left out."""
        return int(((self.last + 1) * self.weights).sum())

    def arrays(self) -> dict[str, mx.array]:
        """The same as MLX arrays, by the names that the step uses."""
        return {
            "tokens": mx.array(self.token_ids),
            "last": mx.array(self.last),
            "label_positions": mx.array(self.label_positions),
            "demonstration_labels": mx.array(self.demonstration_labels),
            "gold": mx.array(self.gold),
            "weights": mx.array(self.weights),
        }


def _padded(prompts: Sequence[Prompt], rows: int, bucket_tokens: int) -> MicroBatch:
    longest = max(len(one.token_ids) for one in prompts)
    width = -(-longest // bucket_tokens) * bucket_tokens
    filled = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
    token_ids = np.zeros((rows, width), dtype=np.int32)
    for row, one in enumerate(filled):
        token_ids[row, : len(one.token_ids)] = one.token_ids
    return MicroBatch(
        token_ids=token_ids,
        last=np.array([one.last for one in filled], dtype=np.int32),
        label_positions=np.array([one.label_positions for one in filled], dtype=np.int32),
        demonstration_labels=np.array([one.demonstration_labels for one in filled], dtype=np.int32),
        gold=np.array([one.gold for one in filled], dtype=np.int32),
        weights=(np.arange(rows) < len(prompts)).astype(np.float32),
    )


def micro_batches(
    prompts: Sequence[Prompt], rows: int, *, bucket_tokens: int = 32
) -> list[MicroBatch]:
    """Cut one update into micro-batches of the same number of rows.

    Prompts are sorted by length, so that each micro-batch holds prompts of like length; lengths
    are rounded up to a multiple of ``bucket_tokens``. A compiled step then meets a handful of
    shapes.

    Args:
        prompts: the update's prompts, all with the same number of demonstrations.
        rows: rows of every micro-batch; the last one is filled up with rows of weight 0.
        bucket_tokens: what widths are rounded up to.

    Returns:
        Micro-batches, shortest first.
    """
    ordered = sorted(prompts, key=lambda one: len(one.token_ids))
    rows = min(rows, len(ordered))
    chunks = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
    return [_padded(chunk, rows, bucket_tokens) for chunk in chunks]


def rows_within(budget_tokens: int, longest_tokens: int, prompts: int, bucket_tokens: int) -> int:
    """Rows of a micro-batch: the largest power of two that a token budget holds, at least one.

    Args:
        budget_tokens: tokens that one micro-batch may hold, padding included.
        longest_tokens: longest prompt of the whole run.
        prompts: prompts in one update; never more rows than these.
        bucket_tokens: what widths are rounded up to.
    """
    width = -(-longest_tokens // bucket_tokens) * bucket_tokens
    rows = 1
    while rows * 2 * width <= budget_tokens and rows * 2 <= prompts:
        rows *= 2
    return rows


def update_rows(examples: int, prompts_per_update: int, update: int, seed: int) -> list[int]:
    """Indices of the prompts that one update sees.

    The training prompts are passed over again and again, each pass in an order of its own that
    depends on the seed and the pass alone; updates take consecutive pieces of that sequence.

    Args:
        examples: training prompts.
        prompts_per_update: prompts averaged in one update.
        update: number of the update, from 0.
        seed: the recipe's training seed.
    """
    chosen: list[int] = []
    position = update * prompts_per_update
    while len(chosen) < prompts_per_update:
        one_pass, offset = divmod(position, examples)
        order = list(range(examples))
        random.Random(f"{seed}/{one_pass}").shuffle(order)
        piece = order[offset : offset + prompts_per_update - len(chosen)]
        chosen.extend(piece)
        position += len(piece)
    return chosen
