"""What a forward pass gives beyond label probabilities, one batch of prompts at a time.

All that a method of prediction needs can be had from the hidden state at the last position, which
is small: label logits, centroids and, a few prompts at a time, logits of the whole vocabulary.
Letters: B prompts, N prompts in all, T tokens, C labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import activations, limits, ports, runtime
from abft_mlx.errors import RunError
from abft_mlx.evaluation.sharing import own_rows, parts
from abft_mlx.prefix import Prefix, Prefixes
from abft_mlx.prompts import Prompt, PromptBatch
from abft_mlx.ranks import Ranks

# Numbers in one piece of whole-vocabulary logits: 64 MiB of float32.
PIECE = 2**24
# Prompts whose hidden states, gathered from all ranks, are handed on at a time.
TOGETHER = 512


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
    prefix: Prefix | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> Iterator[tuple[np.ndarray, mx.array]]:
    """Hidden states at the last position, batch after batch.

    What prompts share at their beginning is computed once where that is worth it. Every rank
    computes a part of the prompts, and yields all of them.

    Args:
        model: a loaded model.
        prompts: N prompts of any lengths, all with the same number of demonstrations.
        batch_tokens: tokens in one batch, padding and beginnings included.
        prefix: spares the tokens that it holds, for prompts that begin with it.
        on_progress: told how many prompts of how many are done, after each batch.
        ranks: the processes that measure together, each with the same prompts.

    Yields:
        (B,) where each prompt was in ``prompts``, and (B, width) hidden states.

    Raises:
        RunError: a rank is gone.
    """
    ranks = ranks or Ranks()
    share = own_rows(prompts, ranks)
    own = [prompts[row] for row in share]
    mine: list[tuple[np.ndarray, mx.array]] = []
    done = 0
    for behind in parts(model, own, batch_tokens, prefix):
        for whole, all_which in behind.batches(own, batch_tokens):
            for batch, hidden in _evaluated(model, whole, behind.prefix, all_which):
                if len(own) == len(prompts):
                    yield share[batch.rows], hidden
                else:
                    mine.append((share[batch.rows], hidden))
                done += len(batch)
                if on_progress is not None:
                    on_progress(done * len(prompts) // len(own), len(prompts))
    if mine:
        yield from _everybodys(mine, len(prompts), ranks)


def _evaluated(
    model: nn.Module, batch: PromptBatch, prefix: Prefixes | None, which: list[int] | None
) -> Iterator[tuple[PromptBatch, mx.array]]:
    """A batch's hidden states, or those of its halves where memory runs out."""
    waiting = [(batch, which)]
    while waiting:
        some, own = waiting.pop()
        hidden = _hidden_if_it_fits(model, some, prefix, own)
        if hidden is not None:
            yield some, hidden
            continue
        first, second = some.halves()
        middle = len(first)
        waiting.append((second, None if own is None else own[middle:]))
        waiting.append((first, None if own is None else own[:middle]))


def _hidden_if_it_fits(
    model: nn.Module, batch: PromptBatch, prefix: Prefixes | None, which: list[int] | None
) -> mx.array | None:
    """A batch's hidden states, or None where memory ran out over several prompts."""
    limits.check_batch(mx.get_cache_memory())
    try:
        tokens, last = mx.array(batch.tokens), mx.array(batch.last)
        with activations.quickly(model):
            hidden = hidden_at_last(model, tokens, last, prefix, which)
        mx.eval(hidden)
        return hidden
    except (RuntimeError, MemoryError) as error:
        if not runtime.out_of_memory(error):
            raise
        said = str(error) or type(error).__name__
    if len(batch) == 1:
        raise RunError(
            f"a prompt of {len(batch.tokens[0])} tokens does not fit into memory ({said}); take a "
            "4-bit copy of the model, or fewer prompt.demonstrations"
        )
    runtime.release_memory()
    return None


def _everybodys(
    mine: list[tuple[np.ndarray, mx.array]], n: int, ranks: Ranks
) -> Iterator[tuple[np.ndarray, mx.array]]:
    """All ranks' hidden states, some prompts at a time; what a rank has not computed is zero."""
    states = mx.zeros((n, mine[0][1].shape[1]), dtype=mine[0][1].dtype)
    for rows, hidden in mine:
        states[mx.array(rows)] = hidden
    # float32 carries every narrower number and its sum with zeros exactly.
    (states,) = ranks.sum([states])
    for start in range(0, n, TOGETHER):
        some = states[start : start + TOGETHER]
        yield np.arange(start, start + len(some)), some


def hidden_states(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int,
    each: Callable[[np.ndarray, mx.array], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> mx.array:
    """Hidden states at the last position of all prompts.

    Args:
        model: a loaded model.
        prompts: N prompts, at least one, all with the same number of demonstrations.
        batch_tokens: tokens in one batch, padding included.
        each: given rows and hidden states of every batch, as ``hidden_batches`` yields them.
        on_progress: told how many prompts of how many are done, after each batch.
        ranks: the processes that measure together, each of which gets all.

    Returns:
        (N, width) in the model's own number type, in the order of ``prompts``.
    """
    order, parts = [], []
    for rows, hidden in hidden_batches(
        model, prompts, batch_tokens=batch_tokens, on_progress=on_progress, ranks=ranks
    ):
        if each is not None:
            each(rows, hidden)
        order.append(rows)
        parts.append(hidden)
    states = mx.concatenate(parts)[mx.array(np.argsort(np.concatenate(order)))]
    mx.eval(states)
    return states


def vocabulary_logits(model: nn.Module, hidden: mx.array) -> Iterator[mx.array]:
    """Logits of the whole vocabulary, of as many prompts at a time as make a small array.

    Args:
        model: a loaded model.
        hidden: (N, width) hidden states at the last position.

    Yields:
        (B, V) float32, in order; B · V is at most PIECE, or B is 1.
    """
    port = ports.port_for(model)
    several = max(1, PIECE // ports.output_dims(port.head(model)))
    for start in range(0, len(hidden), several):
        logits = port.logits(model, hidden[start : start + several])
        mx.eval(logits)
        yield logits
