"""From a recipe, or a trained run, to measured accuracy, a verdict, or what heads do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx import adapters, data, evaluation, facts, prediction
from abft_mlx import recipe as recipes
from abft_mlx.errors import DataError
from abft_mlx.events import Events
from abft_mlx.experiment.opened import Experiment, prepare
from abft_mlx.induction import Heads
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import RunFolder

# Enough for a head's mean attention to two digits.
HEADS_PROMPTS = 128
# Simple baselines learn from at most so many training texts.
MOST_BASELINE_TEXTS = 4096


class _Named(Events):
    """Passes stages and progress on, with words before each stage's name."""

    def __init__(self, events: Events, words: str) -> None:
        self.events, self.words = events, words
        self.progress = events.progress  # type: ignore[method-assign]

    def stage(self, what: str) -> None:
        self.events.stage(self.words + what)


def document(
    experiment: Experiment,
    measured: dict[str, Any],
    *,
    adapter: object = None,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Eval's JSON document (docs/reference.md), of its parts with an adapter and without it.

    Args:
        experiment: what was measured.
        measured: parts of the document, of the model with its adapter, if there is one.
        adapter: what to call it.
        base: the same parts without it.
    """
    recipe, section, task = experiment.recipe, experiment.recipe.evaluation, experiment.task
    result: dict[str, Any] = {
        "schema": facts.SCHEMA,
        "model": recipe.model,
        "adapter": None if adapter is None else str(adapter),
        "data": recipe.data.source,
        "labels": list(task.space.names),
        "label_words": list(task.space.words),
        "chat_template": task.chat_template,
        "k": recipe.prompt.demonstrations,
        "prompts": task.test_queries(section) * section.repeats,
        "seed": section.seed,
        "demonstrations": section.demonstrations,
        "compat": section.compat,
        **measured,
    }
    if base is not None:
        result["base"] = base
        if "methods" in result:
            against = evaluation.against_base(result["methods"], base["methods"])
            result["comparisons"] = result["comparisons"] + against
    return result


def evaluate(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    *,
    events: Events | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a model on fixed seeded test prompts, without and with an adapter.

    Args:
        recipe: names model, data, prompts and the evaluation's size.
        adapter: a run folder, an adapter folder, a hub id, or None.
        events: who hears what is opened and measured, one measurement at a time.
        ranks: the processes that measure together; each gets the whole document.

    Returns:
        The document of ``eval --json``.
    """
    events, ranks = events or Events(), ranks or Ranks()
    adapter = None if adapter is None else adapters.find(adapter)
    if recipe.evaluation.demonstrations == "classifier":
        return _evaluate_shipped(recipe, adapter, events, ranks)
    experiment = prepare(recipe, adapter, events=events)
    _agree(experiment, adapter, ranks)
    named = "model, " if adapter is None else "with adapter, "
    measured = experiment.measure_all(_Named(events, named), ranks)
    base = None
    if adapter is not None:
        adapters.detach(experiment.loaded.model)
        base = experiment.measure_all(_Named(events, "base model, "), ranks)
    return document(experiment, measured, adapter=adapter, base=base)


def heads(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    *,
    prompts: int = HEADS_PROMPTS,
    detectors: bool = True,
    events: Events | None = None,
) -> Heads:
    """What a model's heads do on the first test prompts: `Experiment.heads` of a recipe.

    Args:
        recipe: names model, data and prompts.
        adapter: a run folder, an adapter folder, a hub id, or None.
        prompts: how many test prompts to look at, if there are so many.
        detectors: also score every head on repeated random tokens.
        events: who hears what is opened and how many prompts are done, random rows among them.
    """
    events = events or Events()
    adapter = None if adapter is None else adapters.find(adapter)
    experiment = prepare(recipe, adapter, events=events)
    events.stage("looking at heads")
    return experiment.heads(
        experiment.test_prompts()[:prompts],
        detectors=detectors,
        adapter=None if adapter is None else adapter.name,
        events=events,
    )


def choose(
    experiment: Experiment, *, draws: int | None = None, events: Events | None = None
) -> tuple[prediction.Predictor, float | None]:
    """A predictor of the model as it is now, and its accuracy on the validation texts, if any.

    See :func:`prediction.choose`; ``draws`` None means the recipe's number of sets to try.
    """
    task, pool = experiment.task, experiment.task.splits.training
    k, _ = prediction.demonstrations_that_fit(task.section, pool, task.builder)
    return prediction.choose(
        experiment.loaded.model,
        task.builder,
        pool,
        task.splits.validation,
        k,
        experiment.recipe,
        draws=draws,
        on_progress=(events or Events()).progress,
    )


def choose_trained(
    experiment: Experiment, events: Events | None = None
) -> tuple[prediction.Predictor, dict[str, Any]]:
    """Choose what a trained model predicts with; the untrained one where it does better.

    Prompting the model without its adapter is tried on the validation texts with the same
    demonstrations. If it answers more of them rightly, by more than the standard error of the
    difference, and ``training.keep_best`` is set, the model loses its read-out and its adapter
    starts anew, so that it changes nothing.

    Returns:
        The predictor, and for ``run.json`` what was ``kept``, ``adapter`` or ``prompting``, and
        the accuracy of both on the validation texts, ``validation_accuracy`` and
        ``validation_prompting``; nothing without such texts.
    """
    model, recipe = experiment.loaded.model, experiment.recipe
    predictor, accuracy = choose(experiment, events=events)
    if accuracy is None:
        return predictor, {}
    # Who measures the paper's way wants the paper's adapter.
    shipped = recipe.evaluation.demonstrations == "classifier"
    with adapters.without(model):
        prompting, simple = _settled_again(experiment, predictor)
    n = min(len(experiment.task.splits.validation), recipe.training.validation_prompts)
    worse = shipped and recipe.training.keep_best and clearly_better(simple, accuracy, n)
    if worse:
        adapters.detach(model)
        adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
        predictor = prompting
    kept = "prompting" if worse else "adapter"
    measured = {"kept": kept, "validation_accuracy": accuracy, "validation_prompting": simple}
    return predictor, measured


def clearly_better(accuracy: float, other: float, n: int) -> bool:
    """Whether an accuracy on n texts is above another by more than the standard error."""
    # Of few texts one more right answer says nothing: shares are shrunk towards a half.
    shares = np.array([accuracy * n + 1, other * n + 1]) / (n + 2)
    return bool(accuracy - other > np.sqrt((shares * (1 - shares)).sum() / n))


def validated(experiment: Experiment) -> float:
    """Accuracy on the validation texts, behind the first set of demonstrations."""
    accuracy = choose(experiment, draws=1)[1]
    assert accuracy is not None
    return accuracy


def evaluate_classifier(
    experiment: Experiment,
    predictor: prediction.Predictor,
    adapter: object = None,
    *,
    events: Events | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a classifier on test rows, compare it with simple ones, and judge it.

    Args:
        experiment: its model has the adapter on, if there is one.
        predictor: of that model.
        adapter: what to call the adapter; None for a model without one.
        events: who hears what is measured, one measurement at a time.
        ranks: the processes that measure together; each gets the whole document.

    Returns:
        Eval's JSON with ``methods.classifier``, ``baselines`` and ``verdict``.

    Raises:
        RunError: the model's probabilities are not finite, or a rank is gone.
    """
    events, section = events or Events(), experiment.recipe.evaluation
    splits = experiment.task.splits
    pairs = splits.test.pairs()[: section.queries]
    gold = np.array([label for _, label in pairs])
    groups, names = np.arange(len(pairs)), experiment.task.space.names

    def measure(predictor: prediction.Predictor) -> dict[str, Any]:
        """Parts of eval's JSON: the classifier with calibration, and vanilla without."""
        raw = predictor.raw_probabilities(predictor.prompts_of(pairs), events.progress, ranks)
        evaluation.check_finite(raw)
        calibrated = predictor.calibrated(raw)
        # log p times the temperature is the scores again, up to a constant.
        scores = predictor.temperature * np.log(np.maximum(calibrated, 1e-300))
        before = evaluation.summary(evaluation.softmax(scores), gold)["expected_calibration_error"]
        return {
            "methods": {
                "classifier": evaluation.entry(calibrated, gold, groups, section),
                "vanilla": evaluation.entry(raw, gold, groups, section),
            },
            "probabilities": {
                "temperature": predictor.temperature,
                "expected_calibration_error_before": before,
                "coverage": evaluation.coverage(calibrated, gold),
            },
        }

    events.stage("measuring the classifier")
    parts, base = measure(predictor), None
    if adapter is not None:
        events.stage("measuring without the adapter")
        with adapters.without(experiment.loaded.model):
            base = measure(_settled_again(experiment, predictor)[0])
    result = document(experiment, parts | {"comparisons": []}, adapter=adapter, base=base)
    result["k"], result["prompts"], result["baselines"] = predictor.k, len(pairs), {}
    events.stage("bag of words")
    if len(splits.training):
        texts = splits.training.texts[:MOST_BASELINE_TEXTS]
        labels = splits.training.labels[:MOST_BASELINE_TEXTS]
        common = evaluation.majority(labels)
        words = evaluation.bag_of_words(texts, labels, [text for text, _ in pairs], len(names))
        result["baselines"] = {
            "majority": {"label": names[common], "accuracy": float((gold == common).mean())},
            "bag_of_words": evaluation.entry(words, gold, groups, section),
        }
    result["verdict"] = evaluation.verdict(result)
    return result


def _settled_again(
    experiment: Experiment, predictor: prediction.Predictor
) -> tuple[prediction.Predictor, float]:
    """The same demonstrations on the model as it is now, with a calibration of its own.

    With it comes the accuracy on the validation texts, 0 without any.
    """
    recipe, splits = experiment.recipe, experiment.task.splits
    # No labels are used, so test texts serve where there are no training texts.
    pool = splits.training if len(splits.training) else splits.test
    texts = prediction.calibration_texts(
        pool, predictor, recipe.prediction.calibration_texts, recipe.evaluation.seed
    )
    base = prediction.Predictor(
        experiment.loaded.model,
        predictor.builder,
        predictor.demonstrations,
        recipe.evaluation.batch_tokens,
        nearest=predictor.nearest,
    )
    labelled = splits.validation.pairs()[: recipe.training.validation_prompts]
    quality = prediction.settle(base, texts, labelled)
    return base, quality[0] if quality else 0.0


def _agree(experiment: Experiment, adapter: adapters.Source | None, ranks: Ranks) -> None:
    """Check that all ranks measure the same."""
    if ranks.size > 1:
        tasks = (experiment.task, *experiment.trained_tasks, *experiment.others)
        made_with = facts.made_with(experiment.recipe, experiment.loaded, tasks)
        attached = "" if adapter is None else facts.weights_fingerprint(adapter.folder)
        text = facts.digest(made_with) + attached
        ranks.agree(text, "recipe, model, adapter, data or version")


def _evaluate_shipped(
    recipe: recipes.Recipe, adapter: adapters.Source | None, events: Events, ranks: Ranks
) -> dict[str, Any]:
    """Measure what predict uses: a run's own demonstrations, or ones chosen as finetune does."""
    run: dict[str, Any] = {}
    shipped = None if adapter is None else prediction.Shipped.read(adapter.folder)
    if adapter is not None and shipped is not None:
        run = RunFolder(adapter.folder).read_run()
        section = prediction.with_words(recipes.task(recipe), shipped)
        recipe = recipe.model_copy(update={"data": section.data, "prompt": section.prompt})
        source = recipe.data.source
        if data.kind(source) == "file" and not Path(source).expanduser().exists():
            raise DataError(
                f"{source}: no such file, and the test rows come from it; give labelled texts with "
                "--data FILE (predict needs none)"
            )
    # A classifier that Python saved does not know its texts: all others are test texts.
    trained_on = None if shipped is None else run.get("data", {}).get("fingerprint", "")
    experiment = prepare(recipe, adapter, events=events, trained_on=trained_on)
    if trained_on:
        _check_rows(experiment, run)
    _agree(experiment, adapter, ranks)
    if not len(experiment.task.splits.test):
        raise DataError(
            f"{recipe.data.source} has no test rows (data.holdout is {recipe.data.holdout}); give "
            "other labelled texts with --data"
        )
    if shipped is not None:
        model, builder = experiment.loaded.model, experiment.task.builder
        predictor = shipped.predictor(model, builder, recipe.evaluation.batch_tokens)
    else:
        events.stage("choosing demonstrations")
        predictor, _ = choose(experiment, events=events)
    return evaluate_classifier(experiment, predictor, adapter, events=events, ranks=ranks)


def _check_rows(experiment: Experiment, run: dict[str, Any]) -> None:
    """See that no row that a run was trained on is measured, as far as its facts tell."""
    before, section, task = run["data"], experiment.recipe.data, experiment.task
    if before["fingerprint"] == task.texts.fingerprint():
        rows = {name: len(part) for name, part in task.splits.rows.items()}
        same = (before.get("rows", rows), run["seeds"]["data"]) == (rows, section.seed)
    else:
        same = Path(section.source).resolve() != Path(before["source"]).resolve()
    if not same:
        raise DataError(
            f"{section.source}, or how it is divided, is not what it was when this run was "
            "trained, so rows that it was trained on would be measured; put that back, or give "
            "other labelled texts with --data"
        )
