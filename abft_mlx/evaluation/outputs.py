"""What a forward pass gives beyond label probabilities, one batch of prompts at a time.

All that a method of prediction needs can be had from the hidden state at the last position, which
is small: label logits, centroids and, a few prompts at a time, logits of the whole vocabulary.
Letters: B prompts, N prompts in all, T tokens, C labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import activations, ports, runtime
from abft_mlx.errors import RunError
from abft_mlx.evaluation.continuations import Continuations
from abft_mlx.evaluation.sharing import own_rows, parts
from abft_mlx.prefix import Prefix, Prefixes
from abft_mlx.prompts import LabelSpace, Prompt, PromptBatch
from abft_mlx.ranks import Ranks

# Prompts whose hidden states, gathered from all ranks, are handed on at a time.
TOGETHER = 512

Found = TypeVar("Found")


class Outputs(NamedTuple):
    """What a batch of prompts gives.

    Attributes:
        rows: (B,) where each prompt was among all prompts.
        hidden: (B, width) hidden states at the last position, after the final norm.
        later: (B, C) float64, log-probability of each class's tokens behind the first; None where
            every word is one token.
    """

    rows: np.ndarray
    hidden: mx.array
    later: np.ndarray | None


def hidden_at_last(
    model: nn.Module,
    tokens: mx.array,
    last: mx.array,
    prefix: Prefixes | None = None,
    which: Sequence[int] | None = None,
) -> mx.array:
    """Hidden state after the final norm at each prompt's last position.

    Args:
        model: a loaded model.
        tokens: (B, T) right-padded token ids.
        last: (B,) index of each prompt's last token.
        prefix: what stands before the tokens, computed already.
        which: (B,) the beginning that each prompt has, where there are several.

    Returns:
        (B, width) in the model's own number type.
    """
    hidden = prefix.hidden(tokens, which) if prefix else ports.port_for(model).hidden(model, tokens)
    return mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def hidden_batches(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int,
    space: LabelSpace | None = None,
    prefix: Prefix | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Outputs]:
    """Hidden states at the last position, batch after batch, and what label scores need beside.

    What prompts share at their beginning is computed once where that is worth it. Every rank
    computes a part of the prompts, and yields all of them.

    Args:
        model: a loaded model.
        prompts: N prompts of any lengths, all with the same number of demonstrations.
        batch_tokens: tokens in one batch, padding and beginnings included.
        space: the labels, where their words are to be scored: words of several tokens are then
            run behind each prompt.
        prefix: spares the tokens that it holds, for prompts that begin with it.
        on_progress: told how many prompts of how many are done, after each batch.
        ranks: the processes that measure together, each with the same prompts.

    Yields:
        Each batch's rows, hidden states and scores of later tokens.

    Raises:
        RunError: a rank is gone.
    """
    ranks = ranks or Ranks()
    words = None if space is None or space.single else Continuations(space.targets)
    share = own_rows(prompts, ranks)
    own = [prompts[row] for row in share]
    mine: list[Outputs] = []
    done = 0
    for behind in parts(model, own, batch_tokens, prefix):
        for whole, all_which in behind.batches(own, batch_tokens):
            for batch, which in (
                [(whole, all_which)] if words is None else _of_one_length(whole, all_which)
            ):
                run = partial(_run, model, behind.prefix, words, batch_tokens)
                for rows, hidden, later in in_halves(model, run, batch, which):
                    found = Outputs(share[rows], hidden, later)
                    if len(own) == len(prompts):
                        yield found
                    else:
                        mine.append(found)
                    done += len(rows)
                    if on_progress is not None:
                        on_progress(done * len(prompts) // len(own), len(prompts))
    if mine:
        yield from _everybodys(mine, len(prompts), ranks)


def _of_one_length(
    batch: PromptBatch, which: list[int] | None
) -> Iterator[tuple[PromptBatch, list[int] | None]]:
    """A batch parted by length, without padding: words go on behind a prompt's last token."""
    for last in np.unique(batch.last):
        rows = np.flatnonzero(batch.last == last)
        values = {one.name: getattr(batch, one.name)[rows] for one in fields(batch)}
        values["tokens"] = values["tokens"][:, : last + 1]
        yield PromptBatch(**values), None if which is None else [which[row] for row in rows]


def in_halves(
    model: nn.Module,
    run: Callable[[PromptBatch, list[int] | None], Found],
    batch: PromptBatch,
    which: list[int] | None = None,
) -> Iterator[Found]:
    """What a forward pass gives of a batch, or of its halves where memory runs out.

    Args:
        model: that runs.
        run: evaluates a batch, given which beginning each of its prompts has.
        batch: B prompts.
        which: (B,) beginnings, or None.

    Raises:
        RunError: a single prompt does not fit into memory.
    """
    waiting = [(batch, which)]
    while waiting:
        some, own = waiting.pop()
        try:
            with activations.quickly(model):
                found = run(some, own)
        except (RuntimeError, MemoryError) as error:
            if not runtime.out_of_memory(error):
                raise
            said = str(error) or type(error).__name__
        else:
            yield found
            continue
        if len(some) == 1:
            raise RunError(
                f"a prompt of {len(some.tokens[0])} tokens does not fit into memory ({said}); "
                "take a 4-bit copy of the model, or fewer prompt.demonstrations"
            )
        runtime.release_memory()
        first, second = some.halves()
        middle = len(first)
        waiting.append((second, None if own is None else own[middle:]))
        waiting.append((first, None if own is None else own[:middle]))


def _run(
    model: nn.Module,
    prefix: Prefixes | None,
    words: Continuations | None,
    batch_tokens: int,
    batch: PromptBatch,
    which: list[int] | None,
) -> Outputs:
    tokens = mx.array(batch.tokens)
    if words is None:
        hidden = hidden_at_last(model, tokens, mx.array(batch.last), prefix, which)
        mx.eval(hidden)
        return Outputs(batch.rows, hidden, None)
    prefix = prefix if prefix is not None else Prefixes(model, [])
    hidden, asked = prefix.extended(tokens, which)
    return Outputs(batch.rows, hidden, words.scores(asked, batch_tokens))


def _everybodys(mine: list[Outputs], n: int, ranks: Ranks) -> Iterator[Outputs]:
    """All ranks' outputs, some prompts at a time; what a rank has not computed is zero."""
    states = mx.zeros((n, mine[0].hidden.shape[1]), dtype=mine[0].hidden.dtype)
    later = None if mine[0].later is None else np.zeros((n, mine[0].later.shape[1]))
    for one in mine:
        states[mx.array(one.rows)] = one.hidden
        if later is not None:
            later[one.rows] = one.later
    # float32 carries every narrower number and its sum with zeros exactly.
    if later is None:
        (states,) = ranks.sum([states])
    else:
        states, summed = ranks.sum([states, mx.array(later.astype(np.float32))])
        later = np.array(summed, dtype=np.float64)
    for start in range(0, n, TOGETHER):
        some = slice(start, min(start + TOGETHER, n))
        rows = np.arange(some.start, some.stop)
        yield Outputs(rows, states[some], None if later is None else later[some])


def hidden_states(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int,
    space: LabelSpace | None = None,
    each: Callable[[Outputs], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> mx.array:
    """Hidden states at the last position of all prompts.

    Args:
        model: a loaded model.
        prompts: N prompts, at least one, all with the same number of demonstrations.
        batch_tokens: tokens in one batch, padding included.
        space: as for ``hidden_batches``.
        each: given every batch, as ``hidden_batches`` yields them.
        on_progress: told how many prompts of how many are done, after each batch.
        ranks: the processes that measure together, each of which gets all.

    Returns:
        (N, width) in the model's own number type, in the order of ``prompts``.
    """
    found = []
    for one in hidden_batches(
        model, prompts, batch_tokens=batch_tokens, space=space, on_progress=on_progress, ranks=ranks
    ):
        if each is not None:
            each(one)
        found.append(one)
    order = np.argsort(np.concatenate([one.rows for one in found]))
    states = mx.concatenate([one.hidden for one in found])[mx.array(order)]
    mx.eval(states)
    return states
