"""Prompts parted by what they share: batches of whole prompts, and batches behind beginnings.

Letters: N prompts, B of a batch, G beginnings of P tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.nn as nn
import numpy as np

from abft_mlx import runtime
from abft_mlx.prefix import Group, Prefix, Prefixes, cacheable, groups
from abft_mlx.prompts import Prompt, PromptBatch, batches
from abft_mlx.ranks import Ranks

# Behind a beginning prompts are short, and padding to 32 would be half of a batch.
BUCKET = 8
# Of a batch's tokens, so many may be kept, in all layers, as keys and values of beginnings.
KEPT = 1 / 8
# Groups are run side by side if this part of the longest beginning, or more, is in all of them.
ALIKE = 7 / 8


def own_rows(prompts: Sequence[Prompt], ranks: Ranks) -> np.ndarray:
    """Where the prompts are that this rank computes; all of them where there are too few for all.

    What begins alike is adjacent, so that few groups are cut.
    """
    n = len(prompts)
    if n < ranks.size or ranks.size == 1:
        return np.arange(n)
    order = sorted(range(n), key=lambda row: prompts[row].token_ids)
    return np.array(order[n * ranks.rank // ranks.size : n * (ranks.rank + 1) // ranks.size])


@dataclass(frozen=True)
class Part:
    """Prompts that are computed whole, or behind the same beginnings.

    Attributes:
        rows: (n,) where they are among all prompts.
        prefix: what stands before them, computed; None where they are computed whole.
        which: (n,) the beginning that each of them has.
    """

    rows: np.ndarray
    prefix: Prefixes | None = None
    which: np.ndarray | None = None

    def batches(
        self, prompts: Sequence[Prompt], batch_tokens: int
    ) -> Iterator[tuple[PromptBatch, list[int] | None]]:
        """Batches of the prompts, of what they are behind the prefix.

        On a CPU batches of whole prompts are smaller, so that one is done within seconds.

        Args:
            prompts: all N.
            batch_tokens: tokens in one batch, padding and beginnings included.

        Yields:
            A batch, its ``rows`` among all prompts, and the beginning that each of it has.
        """
        size = 0 if self.prefix is None else len(self.prefix)
        if not size:
            batch_tokens = runtime.batch_tokens(batch_tokens)
        own = [prompts[row] for row in self.rows]
        if size:
            own = [replace(one, token_ids=one.token_ids[size:], label_positions=()) for one in own]
        for some in _of_like_length(own) if size else [np.arange(len(own))]:
            for batch in batches(
                [own[place] for place in some],
                max_tokens=batch_tokens,
                bucket_tokens=BUCKET if size else 32,
                cached_tokens=size,
            ):
                places = some[batch.rows]
                which = None if self.which is None else self.which[places].tolist()
                yield replace(batch, rows=self.rows[places]), which


def parts(
    model: nn.Module, prompts: Sequence[Prompt], batch_tokens: int, prefix: Prefix | None = None
) -> Iterator[Part]:
    """Part prompts so that what they share is computed once, where that is worth it.

    Each part's beginnings are computed when it is its turn, and let go of after it.

    Args:
        model: a loaded model; one whose prompts must be computed whole gets one part.
        prompts: N prompts.
        batch_tokens: tokens in one batch.
        prefix: computed already; the only beginning that is looked at, if it is given.
    """
    if prefix is not None:
        behind = np.array([prefix.begins(one) for one in prompts], dtype=bool)
        if not behind.all():
            yield Part(np.flatnonzero(~behind))
        if behind.any():
            yield Part(np.flatnonzero(behind), prefix)
        return
    found = groups([one.token_ids for one in prompts]) if cacheable(model) else []
    whole = np.ones(len(prompts), dtype=bool)
    for group in found:
        whole[list(group.rows)] = False
    if whole.any():
        yield Part(np.flatnonzero(whole))
    for together in _side_by_side(found, batch_tokens):
        size = together[-1].size
        beginnings = [prompts[one.rows[0]].token_ids[:size] for one in together]
        which = np.repeat(np.arange(len(together)), [len(one.rows) for one in together])
        rows = np.concatenate([one.rows for one in together])
        yield Part(rows, Prefixes(model, beginnings), which)


def _side_by_side(found: Sequence[Group], batch_tokens: int) -> list[list[Group]]:
    """Groups that are run together, so that small ones fill a batch; the longest beginnings first.

    Together they keep what all of them can, the shortest one's length.
    """
    made: list[list[Group]] = []
    for group in sorted(found, key=lambda one: -one.size):
        if (
            made
            and group.size >= ALIKE * made[-1][0].size
            and (len(made[-1]) + 1) * group.size <= KEPT * batch_tokens
            and sum(len(one.rows) for one in made[-1]) * group.size < batch_tokens
        ):
            made[-1].append(group)
        else:
            made.append([group])
    return made


def _of_like_length(prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """Where prompts are, parted so that none is padded to more than twice its bucket."""
    buckets = -(-np.array([len(one.token_ids) for one in prompts]) // BUCKET)
    doublings = np.ceil(np.log2(buckets)).astype(int)
    return [np.flatnonzero(doublings == one) for one in np.unique(doublings)[::-1]]
