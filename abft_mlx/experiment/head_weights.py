"""The first step of a read-out: head weights, fitted on the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from abft_mlx import attention, ports, prefix, prompts, read_out, runtime
from abft_mlx.experiment.opened import Experiment
from abft_mlx.trainer import plan


def fit(
    experiment: Experiment,
    training_prompts: Sequence[prompts.Prompt],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Give the experiment's model a read-out, fitted on its first training prompts.

    Args:
        experiment: its model is changed in place.
        training_prompts: in groups of ``training.together`` that share their demonstrations.
        on_progress: called with the number of prompts done and of all.
    """
    model, recipe = experiment.loaded.model, experiment.recipe
    m = recipe.training.together
    chosen = training_prompts[: max(m, recipe.objective.fit_prompts // m * m)]
    longest = max(len(one.token_ids) for one in chosen)
    batch_rows = runtime.batch_tokens(recipe.evaluation.batch_tokens) // longest
    shareable = prefix.shareable(model)
    features, gold, groups = [], [], []
    done = 0
    classes = 1 + max(label for one in chosen for label in one.demonstration_labels)
    for batch in plan.shared_micro_batches(chosen, m, batch_rows, whole=not shareable):
        arrays = batch.arrays()
        tokens, last = arrays["tokens"], arrays["last"]
        if batch.prefix is None:
            rows = attention.forward(model, tokens, last)[1]
        else:
            behind = last - batch.prefix.shape[1]
            rows = prefix.forward(model, arrays["prefix"], tokens, behind)[1]
        labelled = (arrays["label_positions"], arrays["demonstration_labels"])
        features.append(np.array(read_out.features_of(rows, *labelled, classes)))
        gold.append(batch.batch.gold)
        groups.append((done + np.arange(len(batch.batch))) // m)
        done += batch.prompts
        if on_progress is not None:
            on_progress(done, len(chosen))
    weights = read_out.fit(np.concatenate(features), np.concatenate(gold), np.concatenate(groups))
    read_out.attach(model, read_out.by_layer(weights, ports.head_counts(model)))
    mx.eval(model.trainable_parameters())


def blank(experiment: Experiment) -> None:
    """Give the experiment's model a read-out without weights, for a checkpoint to fill."""
    heads = ports.head_counts(experiment.loaded.model)
    read_out.attach(experiment.loaded.model, {n: np.zeros(one) for n, one in heads.items()})
