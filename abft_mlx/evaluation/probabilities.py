"""Label probabilities of prompts, without ever building logits of prompts × tokens × vocabulary.

Letters: B prompts, T tokens, N prompts in all, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import ports
from abft_mlx.errors import RunError
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.evaluation.outputs import Outputs, hidden_at_last, hidden_batches
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
    """Softmax over the classes' scores: the sum of log p over the tokens of each label word.

    Where every word is one token, that is the softmax over the label tokens' logits at each
    prompt's last position.

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
    for one in hidden_batches(
        model,
        prompts,
        batch_tokens=batch_tokens,
        space=space,
        prefix=prefix,
        on_progress=on_progress,
        ranks=ranks,
    ):
        probabilities[one.rows] = softmax(label_scores(model, one, space))
    return probabilities


def check_finite(values: np.ndarray) -> None:
    """See that a model's answers are numbers.

    Args:
        values: (N, C) probabilities or scores of N texts.

    Raises:
        RunError: some are not finite.
    """
    broken = int((~np.isfinite(values).all(axis=1)).sum())
    if broken:
        raise RunError(
            f"{broken} of {len(values)} texts get no finite probabilities: weights of the model "
            "are not finite, or too large for its number type; take another copy of it, or another "
            "model"
        )


def label_scores(model: nn.Module, outputs: Outputs, space: LabelSpace) -> np.ndarray:
    """Scores of the classes: log-probabilities of their words, up to a constant of each prompt.

    The constant is the normaliser of the first token, which no comparison of classes needs.

    Args:
        model: a loaded model.
        outputs: of B prompts, made for the same space.
        space: the labels.

    Returns:
        (B, C), float32 logits where every word is one token, else float64.
    """
    first = mx.array(space.first_ids)
    logits = np.array(ports.port_for(model).logits(model, outputs.hidden, first))
    return logits if outputs.later is None else logits.astype(np.float64) + outputs.later
