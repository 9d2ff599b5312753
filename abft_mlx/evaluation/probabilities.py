"""Label probabilities of prompts, without ever building logits of prompts × tokens × vocabulary.

Letters: B prompts, T tokens, N prompts in all, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import ports
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.evaluation.outputs import hidden_at_last, hidden_batches
from abft_mlx.prefix import Prefix
from abft_mlx.prompts import LabelSpace, Prompt
from abft_mlx.ranks import Ranks


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
    return ports.port_for(model).logits(model, hidden_at_last(model, tokens, last), labels)


def label_probabilities(
    model: nn.Module,
    prompts: Sequence[Prompt],
    space: LabelSpace,
    *,
    batch_tokens: int,
    prefix: Prefix | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Softmax over the label tokens' logits at each prompt's last position.

    Args:
        model: a loaded model.
        prompts: N prompts of any lengths.
        space: the labels.
        batch_tokens: tokens in one batch, padding and the prefix included.
        prefix: spares the tokens that it holds, for prompts that begin with it.
        on_progress: told how many prompts of how many are done, after each batch.
        ranks: the processes that measure together, each of which gets all.

    Returns:
        (N, C) float64, in the order of ``prompts``.
    """
    probabilities = np.zeros((len(prompts), len(space)))
    for rows, hidden in hidden_batches(
        model,
        prompts,
        batch_tokens=batch_tokens,
        prefix=prefix,
        on_progress=on_progress,
        ranks=ranks,
    ):
        probabilities[rows] = probabilities_of_hidden(model, hidden, space)
    return probabilities


def probabilities_of_hidden(model: nn.Module, hidden: mx.array, space: LabelSpace) -> np.ndarray:
    """Softmax over the label tokens' logits, from hidden states at the last position.

    Args:
        model: a loaded model.
        hidden: (N, width), after the final norm.
        space: the labels.

    Returns:
        (N, C) float64.
    """
    logits = ports.port_for(model).logits(model, hidden, mx.array(space.token_ids))
    return softmax(np.array(logits))
