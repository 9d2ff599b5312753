"""What a forward pass gives beyond label probabilities, one batch of prompts at a time.

All that a method of prediction needs can be had from the hidden state at the last position, which
is small: label logits, centroids and, a few prompts at a time, logits of the whole vocabulary.
Letters: B prompts, N prompts in all, T tokens, C labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import ports, runtime
from abft_mlx.errors import RunError
from abft_mlx.evaluation.prefix import Prefix
from abft_mlx.prompts import Prompt, PromptBatch, batches

# Numbers in one piece of whole-vocabulary logits: 64 MiB of float32.
PIECE = 2**24
# Behind a prefix prompts are short, and padding to 32 would be half of a batch.
BUCKET = 8


def hidden_at_last(
    model: nn.Module, tokens: mx.array, last: mx.array, prefix: Prefix | None = None
) -> mx.array:
    """Hidden state after the final norm at each prompt's last position.

    Args:
        model: a loaded model.
        tokens: (B, T) right-padded token ids.
        last: (B,) index of each prompt's last token.
        prefix: what stands before the tokens, computed already.

    Returns:
        (B, width) in the model's own number type.
    """
    hidden = ports.port_for(model).hidden(model, tokens) if not prefix else prefix.hidden(tokens)
    return mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def hidden_batches(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int,
    prefix: Prefix | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[np.ndarray, mx.array]]:
    """Hidden states at the last position, batch after batch.

    Args:
        model: a loaded model.
        prompts: N prompts of any lengths, all with the same number of demonstrations.
        batch_tokens: tokens in one batch, padding and the prefix included.
        prefix: spares the tokens that it holds, for prompts that begin with it.
        on_progress: told how many prompts of how many are done, after each batch.

    Yields:
        (B,) where each prompt was in ``prompts``, and (B, width) hidden states.
    """
    cached = [prefix is not None and prefix.begins(one) for one in prompts]
    done = 0
    for behind in (None, prefix) if any(cached) else (None,):
        rows = np.array([row for row, one in enumerate(cached) if one == (behind is not None)])
        waiting = _batches([prompts[row] for row in rows], batch_tokens, behind)[::-1]
        while waiting:
            batch = waiting.pop()
            hidden = _evaluated(model, batch, behind)
            if hidden is None:
                waiting += batch.halves()[::-1]
                continue
            yield rows[batch.rows], hidden
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(prompts))


def _evaluated(model: nn.Module, batch: PromptBatch, prefix: Prefix | None) -> mx.array | None:
    """A batch's hidden states, or None where memory ran out over several prompts."""
    tokens, last = mx.array(batch.tokens), mx.array(batch.last)
    try:
        hidden = hidden_at_last(model, tokens, last, prefix)
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


def _batches(
    prompts: Sequence[Prompt], batch_tokens: int, prefix: Prefix | None
) -> list[PromptBatch]:
    """Batches of whole prompts, or of what they are behind a prefix."""
    if prefix is None:
        return batches(prompts, max_tokens=batch_tokens)
    size = len(prefix)
    own = [replace(one, token_ids=one.token_ids[size:], label_positions=()) for one in prompts]
    return batches(own, max_tokens=batch_tokens, bucket_tokens=BUCKET, cached_tokens=size)


def hidden_states(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int,
    each: Callable[[np.ndarray, mx.array], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Hidden states at the last position of all prompts.

    Args:
        model: a loaded model.
        prompts: N prompts, at least one, all with the same number of demonstrations.
        batch_tokens: tokens in one batch, padding included.
        each: given rows and hidden states of every batch, as ``hidden_batches`` yields them.
        on_progress: told how many prompts of how many are done, after each batch.

    Returns:
        (N, width) in the model's own number type, in the order of ``prompts``.
    """
    order, parts = [], []
    for rows, hidden in hidden_batches(
        model, prompts, batch_tokens=batch_tokens, on_progress=on_progress
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
