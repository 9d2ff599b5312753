"""Prompts of a run, and batches of similar length that keep the number of shapes small."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from abft_mlx.data import LabelledTexts, evaluation_draws, training_draws
from abft_mlx.errors import DataError, PromptError
from abft_mlx.prompts.builder import Prompt, PromptBuilder

PADDING_TOKEN = 0
NO_TOKEN = -1


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the right to one length; all arrays int32.

    Attributes:
        tokens: (B, T); padding is token 0 and lies behind `last`.
        last: (B,) position of each prompt's last token.
        label_positions: (B, K).
        demonstration_labels: (B, K) class numbers.
        gold: (B,) class numbers.
        target: (B, W) tokens of the gold labels, NO_TOKEN behind shorter ones.
        rows: (B,) where each prompt was in the sequence that was batched.
    """

    tokens: NDArray[np.int32]
    last: NDArray[np.int32]
    label_positions: NDArray[np.int32]
    demonstration_labels: NDArray[np.int32]
    gold: NDArray[np.int32]
    target: NDArray[np.int32]
    rows: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.last)

    def halves(self) -> list[PromptBatch]:
        """The same prompts in two batches of the same width."""
        middle = len(self) // 2
        return [self._taken(part) for part in (slice(middle), slice(middle, None))]

    def of_one_length(self) -> list[PromptBatch]:
        """The same prompts in batches without padding."""
        parts = [(int(last), self._taken(self.last == last)) for last in np.unique(self.last)]
        return [replace(part, tokens=part.tokens[:, : last + 1]) for last, part in parts]

    def _taken(self, rows: slice | NDArray[np.bool_]) -> PromptBatch:
        """Some of the prompts."""
        return PromptBatch(**{part.name: getattr(self, part.name)[rows] for part in fields(self)})


def batches(
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    bucket_tokens: int = 32,
    cached_tokens: int = 0,
) -> list[PromptBatch]:
    """Cut prompts into batches, longest first, so that a run that fails for memory fails at once.

    Args:
        prompts: all with the same number of demonstrations.
        max_tokens: of a batch, padding counted; a single prompt that is longer makes a batch of
            its own.
        bucket_tokens: T is a multiple of this, so that few shapes occur.
        cached_tokens: tokens of a prefix before every prompt; they count.
    """
    if len({len(prompt.label_positions) for prompt in prompts}) > 1:
        raise PromptError("prompts with different numbers of demonstrations share no batch")
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].token_ids), row))
    result = []
    while order:
        longest = len(prompts[order[0]].token_ids)
        width = -(-longest // bucket_tokens) * bucket_tokens
        size = max(1, max_tokens // (cached_tokens + width))
        if cached_tokens:
            # What is short behind a long beginning would be mostly padding.
            buckets = (-(-len(prompts[row].token_ids) // bucket_tokens) for row in order[:size])
            size = sum(2 * bucket_tokens * count >= width for count in buckets)
        result.append(pad(prompts, order[:size], width))
        del order[:size]
    return result


def pad(prompts: Sequence[Prompt], rows: Sequence[int], width: int) -> PromptBatch:
    """One batch of the prompts at these rows, which may occur again, padded to T = width.

    W is the longest target of all prompts, so that batches of the same prompts are alike.
    """
    chosen = [prompts[row] for row in rows]
    longest = max(len(prompt.target) for prompt in prompts)

    def table(values: Sequence[tuple[int, ...]], width: int, padding: int) -> NDArray[np.int32]:
        result = np.full((len(rows), width), padding, dtype=np.int32)
        for row, value in zip(result, values, strict=True):
            row[: len(value)] = value
        return result

    k = len(chosen[0].label_positions)
    return PromptBatch(
        tokens=table([prompt.token_ids for prompt in chosen], width, PADDING_TOKEN),
        last=np.array([prompt.last for prompt in chosen], dtype=np.int32),
        label_positions=table([prompt.label_positions for prompt in chosen], k, 0),
        demonstration_labels=table([prompt.demonstration_labels for prompt in chosen], k, 0),
        gold=np.array([prompt.gold for prompt in chosen], dtype=np.int32),
        target=table([prompt.target for prompt in chosen], longest, NO_TOKEN),
        rows=np.array(rows, dtype=np.int32),
    )


class Prompts(Sequence[Prompt]):
    """``size`` prompts that are built when they are first asked for, and kept."""

    def __init__(self, size: int, build: Callable[[int], Prompt]) -> None:
        self._size, self._build = size, functools.cache(build)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self._build(number) for number in range(self._size)[index]]
        return self._build(range(self._size)[index])


def training_prompts(
    builder: PromptBuilder,
    texts: LabelledTexts,
    n: int,
    k: int,
    seed: int = 42,
    together: int = 1,
    selection: str = "random",
) -> Prompts:
    """N prompts of k demonstrations and a query, all from the training part.

    The draw is that of :func:`abft_mlx.data.training_draws`; ``together`` prompts in a row share
    their demonstrations. A prompt that cannot be built raises PromptError when it is asked for.
    """
    pairs = texts.pairs()
    drawn = training_draws(texts, n, k, seed, together, selection)

    def build(number: int) -> Prompt:
        rows = drawn[number]
        *shown, query = (pairs[row] for row in rows)
        places = ", ".join(texts.places[row] if texts.places else f"row {row + 1}" for row in rows)
        where = f"training prompt {number} ({places})"
        return builder.build(shown, *query, where=where)

    return Prompts(len(drawn), build)


def evaluation_prompts(
    builder: PromptBuilder,
    demonstrations: LabelledTexts,
    test: LabelledTexts,
    queries: int,
    repeats: int,
    k: int,
    seed: int = 42,
    *,
    fixed: bool = False,
    selection: str = "random",
    limit: int | None = None,
) -> Prompts:
    """Test prompts: every query with its demonstrations, repeat after repeat; the first ``limit``.

    Query q in repeat r is prompt q + n · r, where n is the smaller of queries and len(test). The
    draw is that of :func:`abft_mlx.data.evaluation_draws`; ``fixed`` shows all prompts of a repeat
    the same demonstrations. A prompt that cannot be built raises PromptError when it is asked for.
    """
    n = min(queries, len(test))
    if not n or not len(demonstrations):
        raise DataError(
            f"{test.source}: {len(demonstrations)} demonstration rows and {len(test)} test rows; "
            "evaluation needs both"
        )
    pool, tests = demonstrations.pairs(), test.pairs()
    drawn = evaluation_draws(
        demonstrations, test.texts[:n], repeats, k, seed, selection=selection, fixed=fixed
    )[:limit]

    def build(number: int) -> Prompt:
        where = f"evaluation prompt {number} (test row {number % n})"
        chosen = [pool[row] for row in drawn[number]]
        return builder.build(chosen, *tests[number % n], where=where)

    return Prompts(len(drawn), build)
