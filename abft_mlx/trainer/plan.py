"""Which prompts each update sees, and how an update is cut into micro-batches of few shapes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
        places = (batch.last + 1 - shared)[:, None] + np.arange(answers.shape[1])
        np.put_along_axis(
            tokens, places, np.where(answers == NO_TOKEN, PADDING_TOKEN, answers), axis=1
        )
        return replace(self, batch=replace(batch, tokens=tokens))


def _filled(prompts: Sequence[Prompt], chosen: list[int], rows: int, width: int) -> MicroBatch:
    """A micro-batch of some prompts, filled up with the last one."""
    filling = [chosen[-1]] * (rows - len(chosen))
    weights = (np.arange(rows) < len(chosen)).astype(np.float32)
    return MicroBatch(pad(prompts, chosen + filling, width), weights)


def padded_tokens(longest_tokens: int, bucket_tokens: int = BUCKET_TOKENS) -> int:
    """T of a micro-batch whose longest prompt has so many tokens."""
    return -(-longest_tokens // bucket_tokens) * bucket_tokens


def micro_batches(
    prompts: Sequence[Prompt], rows: int, *, bucket_tokens: int = BUCKET_TOKENS
) -> list[MicroBatch]:
    """Cut one update into micro-batches of the same number of rows, shortest first.

    Each holds prompts of like length, and its width is rounded up to a multiple of
    ``bucket_tokens``, so that a compiled step meets a handful of shapes. The last one is filled up
    with rows of weight 0. All prompts have the same number of demonstrations.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].token_ids))
    rows = min(rows, len(order))
    cut = []
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        width = padded_tokens(len(prompts[chosen[-1]].token_ids), bucket_tokens)
        cut.append(_filled(prompts, chosen, rows, width))
    return cut


def shared_micro_batches(
    prompts: Sequence[Prompt],
    together: int,
    rows: int,
    *,
    bucket_tokens: int = 1,
    whole: bool = False,
) -> list[MicroBatch]:
    """Cut one update, each ``together`` prompts of which share demonstrations.

    Groups whose shared beginnings are equally long go into one micro-batch of at most ``rows``
    prompts, but at least one group. Where lengths are rounded to ``bucket_tokens``, shapes are to
    be few: then every micro-batch has the same number of groups, the last one filled up with
    prompts of weight 0, and the shortest of its beginnings is what all share. The rest of a
    beginning stands in each of its prompts. With ``whole``, for a model that cannot share, so does
    all of it.
    """
    groups: list[tuple[int, int, list[Prompt]]] = []
    for start in range(0, len(prompts), together):
        group = list(prompts[start : start + together])
        tokens = [prompt.token_ids for prompt in group]
        # Each prompt keeps a token of its own, its last.
        shared = 0 if whole else min(len(common_prefix(tokens)), min(map(len, tokens)) - 1)
        groups.append((shared // bucket_tokens * bucket_tokens, max(map(len, tokens)), group))
    groups.sort(key=lambda one: one[:2])
    size = max(1, rows // together)
    if bucket_tokens == 1:
        cut = []
        for _, alike in itertools.groupby(groups, key=lambda one: one[0]):
            cut += _pieces(list(alike), size)
        return [_sharing(piece, len(piece), bucket_tokens) for piece in cut]
    size = min(size, FEW_GROUPS, len(groups))
    return [_sharing(piece, size, bucket_tokens) for piece in _pieces(groups, size)]


def _pieces(groups: list[Any], size: int) -> list[list[Any]]:
    """Groups in lists of so many."""
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def _sharing(
    groups: Sequence[tuple[int, int, list[Prompt]]], size: int, bucket_tokens: int
) -> MicroBatch:
    """A micro-batch of so many groups, filled up with the last one."""
    shared, together = min(part[0] for part in groups), len(groups[0][2])
    filled = [*groups, *[groups[-1]] * (size - len(groups))]
    chosen = [prompt for _, _, group in filled for prompt in group]
    longest = max(part[1] for part in groups)
    whole = pad(chosen, range(len(chosen)), shared + padded_tokens(longest - shared, bucket_tokens))
    return MicroBatch(
        replace(whole, tokens=whole.tokens[:, shared:]),
        (np.arange(len(chosen)) < len(groups) * together).astype(np.float32),
        whole.tokens[::together, :shared] if shared else None,
    )


def rows_within(budget_tokens: int, longest_tokens: int, prompts: int, bucket_tokens: int) -> int:
    """Rows of a micro-batch: the largest power of two that a token budget holds, at least one.

    Never more than ``prompts``; the longest prompt of the run decides, padding counted.
    """
    width = padded_tokens(longest_tokens, bucket_tokens)
    rows = 1
    while rows * 2 * width <= budget_tokens and rows * 2 <= prompts:
        rows *= 2
    return rows


def update_rows(examples: int, prompts_per_update: int, update: int, seed: int) -> list[int]:
    """Indices of the prompts that update number ``update``, from 0, sees.

    The examples are passed over again and again, each pass in an order of its own that depends on
    the seed and the pass alone; updates take consecutive pieces of that sequence.
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


def share(groups: Sequence[int], lengths: Sequence[int], rank: int, size: int) -> list[int]:
    """One rank's part of an update: every group in one part of ``size``, lengths alike."""
    order = sorted(range(len(groups)), key=lambda number: lengths[number])
    return [groups[number] for number in order[rank::size]]
