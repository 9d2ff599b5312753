"""The classifier that a run ships: chosen, measured on test rows, and judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from abft_mlx import adapters, evaluation, prediction
from abft_mlx.evaluation.baselines import bag_of_words, majority
from abft_mlx.experiment.opened import Experiment
from abft_mlx.ranks import Ranks

Progress = Callable[[int, int], None]
# Simple baselines learn from at most so many training texts.
MOST_BASELINE_TEXTS = 4096


def choose(
    experiment: Experiment, *, draws: int | None = None, on_progress: Progress | None = None
) -> tuple[prediction.Predictor, float | None]:
    """Choose demonstrations for the model as it is now: see :func:`prediction.choose`.

    Args:
        experiment: its training texts are shown, its validation texts decide.
        draws: sets of demonstrations to try; None means the recipe's number.
        on_progress: called with the number of validation prompts done and of all.
    """
    task = experiment.task
    section = task.section
    pool = task.splits.training
    k, _ = prediction.demonstrations_that_fit(section, pool, task.builder)
    return prediction.choose(
        experiment.loaded.model,
        task.builder,
        pool,
        task.splits.validation,
        k,
        experiment.recipe,
        draws=draws,
        on_progress=on_progress,
    )


def measure(
    experiment: Experiment,
    predictor: prediction.Predictor,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """``methods`` and ``probabilities`` of eval's JSON, on the test rows.

    Args:
        experiment: its first ``evaluation.queries`` test rows are asked, once each.
        predictor: of the model as it is now.
        on_progress: called with the number of prompts done and of all.
        ranks: the processes that measure together; each gets all.

    Returns:
        Methods ``classifier``, what ``predict`` answers with, and ``vanilla``, without
        calibration; and ``probabilities``: the temperature, the calibration error without it, and
        the share and accuracy of texts above each threshold.

    Raises:
        RunError: the model's probabilities are not finite, or a rank is gone.
    """
    section = experiment.recipe.evaluation
    pairs = experiment.splits.test.pairs()[: section.queries]
    gold = np.array([label for _, label in pairs])
    groups = np.arange(len(pairs))
    raw = predictor.raw_probabilities(predictor.prompts_of(pairs), on_progress, ranks)
    evaluation.check_finite(raw)
    found = {"classifier": predictor.calibrated(raw), "vanilla": raw}
    # log p times the temperature is the scores again, up to a constant.
    scores = predictor.temperature * np.log(np.maximum(found["classifier"], 1e-300))
    return {
        "methods": {
            name: evaluation.entry(one, gold, groups, section) for name, one in found.items()
        },
        "probabilities": {
            "temperature": predictor.temperature,
            "expected_calibration_error_before": evaluation.expected_calibration_error(
                evaluation.softmax(scores), gold
            ),
            "coverage": evaluation.coverage(found["classifier"], gold),
        },
    }


def measure_base(
    experiment: Experiment,
    predictor: prediction.Predictor,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """As :func:`measure` without the adapter: the same demonstrations, its own calibration."""
    model, recipe, splits = experiment.loaded.model, experiment.recipe, experiment.splits
    # No labels are used, so test texts serve where there are no training texts.
    pool = splits.training if len(splits.training) else splits.test
    texts = prediction.calibration_texts(
        pool, predictor, recipe.prediction.calibration_texts, recipe.evaluation.seed
    )
    with adapters.without(model):
        base = prediction.Predictor(
            model,
            predictor.builder,
            predictor.demonstrations,
            recipe.evaluation.batch_tokens,
            nearest=predictor.nearest,
        )
        asked = splits.validation.pairs()[: recipe.training.validation_prompts]
        prediction.settle(base, texts, asked)
        return measure(experiment, base, on_progress, ranks)


def simple_baselines(experiment: Experiment) -> dict[str, Any]:
    """Majority class and bag of words, learned from the training rows, on the test rows.

    Returns:
        ``baselines`` of eval's JSON; empty where there are no training rows.
    """
    section, training = experiment.recipe.evaluation, experiment.splits.training
    if not len(training):
        return {}
    pairs = experiment.splits.test.pairs()[: section.queries]
    gold = np.array([label for _, label in pairs])
    groups = np.arange(len(pairs))
    classes = len(experiment.space)
    texts, labels = training.texts[:MOST_BASELINE_TEXTS], training.labels[:MOST_BASELINE_TEXTS]
    common = majority(labels)
    probabilities = bag_of_words(texts, labels, [text for text, _ in pairs], classes)
    return {
        "majority": {
            "label": experiment.space.names[common],
            "accuracy": float((gold == common).mean()),
        },
        "bag_of_words": evaluation.entry(probabilities, gold, groups, section),
    }


def judge(document: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Add ``baselines`` and ``verdict`` to eval's JSON of a classifier."""
    document["baselines"] = simple_baselines(experiment)
    document["verdict"] = evaluation.verdict(document)
    return document
