"""Label probabilities of a model that answers from its attention (:mod:`abft_mlx.read_out`).

Letters: N prompts, B of a batch, K demonstrations, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import read_out, runtime
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.evaluation.outputs import in_halves
from abft_mlx.evaluation.sharing import own_rows
from abft_mlx.prefix import AttendedPrefix
from abft_mlx.prompts import Prompt, PromptBatch, batches
from abft_mlx.ranks import Ranks

# Behind a beginning prompts are short, and padding to 32 would be half of a batch.
BUCKET = 8


def read_out_probabilities(
    model: nn.Module,
    prompts: Sequence[Prompt],
    classes: int,
    *,
    batch_tokens: int,
    prefix: AttendedPrefix | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Softmax of the read-out's scores, not centred.

    Args:
        model: a loaded model with a read-out.
        prompts: N prompts, all with the same number of demonstrations.
        classes: C.
        batch_tokens: tokens in one batch, padding and the prefix included.
        prefix: what all prompts begin with, computed; None computes them whole.
        on_progress: called with the number of prompts done and of all.
        ranks: the processes that measure together; each gets all.

    Returns:
        (N, C) float64, in the order of ``prompts``.
    """
    weights, ranks = read_out.of(model), ranks or Ranks()
    assert weights is not None
    behind = prefix or AttendedPrefix(model, ())
    size = len(behind)
    share = own_rows(prompts, ranks)
    own = [replace(prompts[row], token_ids=prompts[row].token_ids[size:]) for row in share]
    probabilities = np.zeros((len(prompts), classes))
    done = 0

    def run(batch: PromptBatch, _which: object) -> tuple[np.ndarray, np.ndarray]:
        rows = behind.rows(mx.array(batch.tokens), mx.array(batch.last))
        positions, labels = mx.array(batch.label_positions), mx.array(batch.demonstration_labels)
        scores = np.array(weights.scores(rows, positions, labels, classes))
        return batch.rows, softmax(scores.astype(np.float64))

    for whole in batches(
        own,
        max_tokens=batch_tokens if size else runtime.batch_tokens(batch_tokens),
        bucket_tokens=BUCKET if size else 32,
        cached_tokens=size,
    ):
        for places, found in in_halves(model, run, whole):
            probabilities[share[places]] = found
            done += len(places)
            if on_progress is not None:
                on_progress(done * len(prompts) // len(own), len(prompts))
    if len(own) < len(prompts):
        (summed,) = ranks.sum([mx.array(probabilities.astype(np.float32))])
        probabilities = np.array(summed, dtype=np.float64)
    return probabilities
