"""Label probabilities of prompts, without ever building logits of prompts × tokens × vocabulary.

Letters: B prompts, T tokens, N prompts in all, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import ports
from abft_mlx.prompts import LabelSpace, Prompt, batches


def label_logits(model: nn.Module, tokens: mx.array, last: mx.array, labels: mx.array) -> mx.array:
    """Logits of the label tokens at each prompt's last position.

    The head is computed at the last position and for the label tokens only.

    Args:
        model: a loaded model.
        tokens: (B, T) right-padded token ids.
        last: (B,) index of each prompt's last token.
        labels: (C,) label token ids.

    Returns:
        (B, C) float32.
    """
    port = ports.port_for(model)
    hidden = port.hidden(model, tokens)
    at_last = mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return port.logits(model, at_last, labels)


def label_probabilities(
    model: nn.Module,
    prompts: Sequence[Prompt],
    space: LabelSpace,
    *,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Softmax over the label tokens' logits at each prompt's last position.

    Args:
        model: a loaded model.
        prompts: N prompts of any lengths.
        space: the labels.
        batch_tokens: tokens in one batch, padding included.
        on_progress: told how many prompts of how many are done, after each batch.

    Returns:
        (N, C) float64, in the order of ``prompts``.
    """
    labels = mx.array(space.token_ids)
    probabilities = np.zeros((len(prompts), len(space.token_ids)))
    done = 0
    for batch in batches(prompts, max_tokens=batch_tokens):
        logits = label_logits(model, mx.array(batch.tokens), mx.array(batch.last), labels)
        values = np.array(logits, dtype=np.float64)
        values = np.exp(values - values.max(axis=1, keepdims=True))
        probabilities[batch.rows] = values / values.sum(axis=1, keepdims=True)
        done += len(batch.rows)
        if on_progress is not None:
            on_progress(done, len(prompts))
    return probabilities
