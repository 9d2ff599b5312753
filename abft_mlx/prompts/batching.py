"""Prompts of a run, and batches of similar length that keep the number of shapes small."""

from __future__ import annotations

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
    max_prompts: int | None = None,
    cached_tokens: int = 0,
) -> list[PromptBatch]:
    """Cut prompts into batches, longest first, so that a run that fails for memory fails at once.

    Args:
        prompts: all with the same number of demonstrations.
        max_tokens: at most this many tokens in a batch, padding counted; a single prompt that is
            longer makes a batch of its own.
        bucket_tokens: T is a multiple of this, so that few shapes occur.
        max_prompts: at most this many prompts in a batch.
        cached_tokens: tokens before every prompt whose keys and values are known; they count.
    """
    if len({len(prompt.label_positions) for prompt in prompts}) > 1:
        raise PromptError("prompts with different numbers of demonstrations share no batch")
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].token_ids), row))
    made = []
    while order:
        longest = len(prompts[order[0]].token_ids)
        width = -(-longest // bucket_tokens) * bucket_tokens
        size = max(1, min(max_tokens // (cached_tokens + width), max_prompts or len(order)))
        if cached_tokens:
            # What is short behind a long beginning would be mostly padding.
            buckets = (-(-len(prompts[row].token_ids) // bucket_tokens) for row in order[:size])
            size = sum(2 * bucket_tokens * count >= width for count in buckets)
        made.append(pad(prompts, order[:size], width))
        del order[:size]
    return made


def pad(prompts: Sequence[Prompt], rows: Sequence[int], width: int) -> PromptBatch:
    """One batch of the prompts at these rows, which may occur again, padded to T = width.

    W is the longest target of all prompts, so that batches of the same prompts are alike.
    """
    longest = max(len(prompt.target) for prompt in prompts)
    tokens = np.full((len(rows), width), PADDING_TOKEN, dtype=np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(prompts[row].token_ids)] = prompts[row].token_ids
    chosen = [prompts[row] for row in rows]
    return PromptBatch(
        tokens=tokens,
        last=np.array([prompt.last for prompt in chosen], dtype=np.int32),
        label_positions=_table([prompt.label_positions for prompt in chosen]),
        demonstration_labels=_table([prompt.demonstration_labels for prompt in chosen]),
        gold=np.array([prompt.gold for prompt in chosen], dtype=np.int32),
        target=_table(
            [prompt.target + (NO_TOKEN,) * (longest - len(prompt.target)) for prompt in chosen]
        ),
        rows=np.array(rows, dtype=np.int32),
    )


def _table(values: Sequence[tuple[int, ...]]) -> NDArray[np.int32]:
    """(N, K) of N rows."""
    return np.array(values, dtype=np.int32).reshape(len(values), -1)


class Prompts(Sequence[Prompt]):
    """Prompts that are built when they are first asked for, and kept.

    Args:
        size: how many there are.
        build: makes prompt number i.
    """

    def __init__(self, size: int, build: Callable[[int], Prompt]) -> None:
        self._build = build
        self._built: list[Prompt | None] = [None] * size

    def __len__(self) -> int:
        return len(self._built)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        prompt = self._built[number]
        if prompt is None:
            prompt = self._built[number] = self._build(number)
        return prompt


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

    Args:
        builder: makes the prompts.
        texts: the training part.
        n: N.
        k: demonstrations.
        seed: of the draw.
        together: this many prompts in a row share their demonstrations.
        selection: random, balanced or nearest; see `data.training_draws`.

    Raises:
        DataError: too few rows.
        RecipeError: nearest, where prompts share their demonstrations.
        PromptError: when a prompt is asked for that cannot be built.
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
    """Test prompts: every query with its demonstrations, repeat after repeat.

    Query q in repeat r is prompt q + n · r, where n is the smaller of queries and len(test).

    Args:
        builder: makes the prompts.
        demonstrations: the part that demonstrations come from.
        test: the part that queries come from.
        queries: at most this many of its first rows.
        repeats: sets of demonstrations for each query.
        k: demonstrations.
        seed: of the draw.
        fixed: all prompts of a repeat show the same demonstrations.
        selection: random (with ``fixed`` false the protocol's), balanced or nearest; see
            `data.evaluation_draws`.
        limit: only so many of them, the first.

    Raises:
        DataError: no demonstrations or no queries.
        RecipeError: nearest and fixed.
        PromptError: when a prompt is asked for that cannot be built.
    """
    n = min(queries, len(test))
    if not n or not len(demonstrations):
        raise DataError(
            f"{test.source}: {len(demonstrations)} demonstration rows and {len(test)} test rows; "
            "evaluation needs both"
        )
    shown, asked = demonstrations.pairs(), test.pairs()
    drawn = evaluation_draws(
        demonstrations, test.texts[:n], repeats, k, seed, selection=selection, fixed=fixed
    )[:limit]

    def build(number: int) -> Prompt:
        where = f"evaluation prompt {number} (test row {number % n})"
        chosen = [shown[row] for row in drawn[number]]
        return builder.build(chosen, *asked[number % n], where=where)

    return Prompts(len(drawn), build)
