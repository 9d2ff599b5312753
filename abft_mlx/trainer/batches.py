"""Which prompts each update sees, and how an update is cut into micro-batches of few shapes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from abft_mlx.prefix import common_prefix
from abft_mlx.prompts import NO_TOKEN, PADDING_TOKEN, Prompt, PromptBatch, pad

# Widths are rounded up to a multiple of this, so that few shapes occur.
BUCKET_TOKENS = 32
# Groups of a micro-batch whose shape is rounded: more differ more in what each of them shares.
FEW_GROUPS = 2


@dataclass(frozen=True)
class MicroBatch:
    """Prompts of one micro-batch; rows of weight 0 only fill the shape.

    Attributes:
        batch: B right-padded prompts.
        weights: (B,) float32, 1 for a prompt and 0 for filling.
        prefix: (G, P) tokens with which groups of B / G prompts begin, or None; the batch's tokens
            then are what comes after them, (B, Q), and its positions count from the beginning.
    """

    batch: PromptBatch
    weights: np.ndarray
    prefix: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T), a shared beginning counted."""
        shared = 0 if self.prefix is None else self.prefix.shape[1]
        return self.batch.tokens.shape[0], shared + self.batch.tokens.shape[1]

    @property
    def prompts(self) -> int:
        """Prompts that count."""
        return int(self.weights.sum())

    @property
    def tokens(self) -> int:
        """Tokens of the prompts that count, padding left out."""
        return int(((self.batch.last + 1) * self.weights).sum())

    def arrays(self) -> dict[str, mx.array]:
        """The same as MLX arrays, by the names that the step uses."""
        names = ("tokens", "last", "label_positions", "demonstration_labels", "gold", "target")
        arrays = {name: mx.array(getattr(self.batch, name)) for name in names}
        arrays["weights"] = mx.array(self.weights)
        if self.prefix is not None:
            arrays["prefix"] = mx.array(self.prefix)
        return arrays

    def answered(self) -> MicroBatch:
        """The same prompts, each followed by its target's tokens but the last (teacher forcing).

        ``last`` stays at the end of the prompt: no position there sees what lies behind it.
        """
        batch, shared = self.batch, 0 if self.prefix is None else self.prefix.shape[1]
        answers = batch.target[:, :-1]
        tokens = np.pad(batch.tokens, ((0, 0), (0, answers.shape[1])))
        positions = (batch.last + 1 - shared)[:, None] + np.arange(answers.shape[1])
        np.put_along_axis(
            tokens, positions, np.where(answers == NO_TOKEN, PADDING_TOKEN, answers), axis=1
        )
        return replace(self, batch=replace(batch, tokens=tokens))


def padded_tokens(longest_tokens: int, bucket_tokens: int = BUCKET_TOKENS) -> int:
    """T of a micro-batch whose longest prompt has so many tokens."""
    return -(-longest_tokens // bucket_tokens) * bucket_tokens


def micro_batches(
    prompts: Sequence[Prompt],
    rows: int,
    *,
    together: int = 1,
    bucket_tokens: int = BUCKET_TOKENS,
    share: bool = True,
) -> list[MicroBatch]:
    """Cut one update into micro-batches of prompts of like length, shortest first.

    Widths are rounded up to a multiple of ``bucket_tokens``, and the last micro-batch is filled up
    with rows of weight 0, so that a compiled step meets a handful of shapes.

    Args:
        prompts: all with the same number of demonstrations.
        rows: prompts of a micro-batch, but at least one group.
        together: so many prompts in a row are a group, which shares its demonstrations. What a
            micro-batch's groups all share is computed once for each; where lengths are not rounded
            (``bucket_tokens`` 1) only groups that share equally much go together, unfilled.
        bucket_tokens: what lengths are rounded to.
        share: False for a model that cannot compute beginnings once.
    """
    # Of each group: tokens that are shared, tokens of the longest prompt, first row.
    groups: list[tuple[int, int, int]] = []
    for start in range(0, len(prompts), together):
        tokens = [prompt.token_ids for prompt in prompts[start : start + together]]
        longest, shared = max(map(len, tokens)), 0
        if share and together > 1:
            # Each prompt keeps a token of its own, its last.
            shared = min(len(common_prefix(tokens)), min(map(len, tokens)) - 1)
        groups.append((shared // bucket_tokens * bucket_tokens, longest, start))
    groups.sort()
    size = max(1, rows // together)
    if together > 1 and bucket_tokens == 1:
        alike = [list(part) for _, part in itertools.groupby(groups, key=lambda group: group[0])]
        fill = 0
    else:
        size = min(size, len(groups), FEW_GROUPS if together > 1 else len(groups))
        alike, fill = [groups], size
    pieces = [part[n : n + size] for part in alike for n in range(0, len(part), size)]
    cut = []
    for piece in pieces:
        filled = piece + piece[-1:] * (fill - len(piece))
        shared, longest = min(group[0] for group in piece), max(group[1] for group in piece)
        chosen = [row for _, _, start in filled for row in range(start, start + together)]
        batch = pad(prompts, chosen, shared + padded_tokens(longest - shared, bucket_tokens))
        prefix = batch.tokens[::together, :shared] if shared else None
        weights = (np.arange(len(chosen)) < len(piece) * together).astype(np.float32)
        cut.append(MicroBatch(replace(batch, tokens=batch.tokens[:, shared:]), weights, prefix))
    return cut


def update_rows(examples: int, prompts_per_update: int, update: int, seed: int) -> list[int]:
    """Indices of the prompts that update number ``update``, from 0, sees.

    The examples are passed over again and again, each pass in an order of its own that depends on
    the seed and the pass alone; updates take consecutive pieces of that sequence.
    """
    rows: list[int] = []
    position = update * prompts_per_update
    while len(rows) < prompts_per_update:
        epoch, offset = divmod(position, examples)
        order = list(range(examples))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        piece = order[offset : offset + prompts_per_update - len(rows)]
        rows.extend(piece)
        position += len(piece)
    return rows


def rank_share(groups: Sequence[int], lengths: Sequence[int], rank: int, size: int) -> list[int]:
    """One rank's part of an update: every group in one part of ``size``, lengths alike."""
    order = sorted(range(len(groups)), key=lambda number: lengths[number])
    return [groups[number] for number in order[rank::size]]
