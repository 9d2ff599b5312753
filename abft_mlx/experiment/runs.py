"""From a recipe to measured accuracy, or to what heads do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from abft_mlx import adapters, data, evaluation, facts, prediction
from abft_mlx import recipe as recipes
from abft_mlx.errors import DataError
from abft_mlx.experiment import shipping
from abft_mlx.experiment.opened import Experiment, prepare
from abft_mlx.induction import Heads
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import RunFolder

# Enough for a head's mean attention to two digits.
HEADS_PROMPTS = 128


def document(
    experiment: Experiment,
    measured: dict[str, Any],
    *,
    adapter: object = None,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Eval's JSON document (docs/reference.md).

    Args:
        experiment: what was measured.
        measured: parts of the document, of the model with its adapter, if there is one.
        adapter: what to call it.
        base: the same parts without it.
    """
    recipe, section = experiment.recipe, experiment.recipe.evaluation
    made: dict[str, Any] = {
        "schema": facts.SCHEMA,
        "model": recipe.model,
        "adapter": None if adapter is None else str(adapter),
        "data": recipe.data.source,
        "labels": list(experiment.space.names),
        "label_words": list(experiment.space.words),
        "chat_template": experiment.task.chat_template,
        "k": recipe.prompt.demonstrations,
        "prompts": experiment.task.test_queries(section) * section.repeats,
        "seed": section.seed,
        "demonstrations": section.demonstrations,
        "compat": section.compat,
        **measured,
    }
    if base is not None:
        made["base"] = base
        if "methods" in made:
            made["comparisons"] = made["comparisons"] + evaluation.against_base(
                made["methods"], base["methods"]
            )
    return made


def evaluate_classifier(
    experiment: Experiment,
    predictor: prediction.Predictor,
    adapter: object = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a classifier on test rows, compare it with simple ones, and judge it.

    Args:
        experiment: its model has the adapter on, if there is one.
        predictor: of that model.
        adapter: what to call the adapter; None for a model without one.
        on_progress: called with the number of prompts done and of all, one measurement at a time.
        on_stage: called with what is measured.
        ranks: the processes that measure together; each gets the whole document.

    Returns:
        Eval's JSON with ``methods.classifier``, ``baselines`` and ``verdict``.
    """
    tell = on_stage or _nothing
    tell("measuring the classifier")
    parts = shipping.measure(experiment, predictor, on_progress, ranks)
    base = None
    if adapter is not None:
        tell("measuring without the adapter")
        base = shipping.measure_base(experiment, predictor, on_progress, ranks)
    made = document(experiment, parts | {"comparisons": []}, adapter=adapter, base=base)
    made["k"] = predictor.k
    made["prompts"] = min(experiment.recipe.evaluation.queries, len(experiment.splits.test))
    tell("bag of words")
    return shipping.judge(made, experiment)


def evaluate(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a model on fixed seeded test prompts, without and with an adapter.

    Args:
        recipe: names model, data, prompts and the evaluation's size.
        adapter: a run folder, an adapter folder, a hub id, or None.
        on_progress: told how many prompts of how many are done, of one measurement at a time.
        on_stage: told what is opened or measured.
        ranks: the processes that measure together; each gets the whole document.

    Returns:
        The document of ``eval --json``. Its parts describe the model with the adapter where
        there is one; ``base`` then holds the same parts without it, and ``comparisons`` also every
        method against itself without the adapter.
    """
    ranks = ranks or Ranks()
    adapter = None if adapter is None else adapters.find(adapter)
    tell = on_stage or _nothing
    shipped = None if adapter is None else prediction.Shipped.read(adapter.folder)
    if recipe.evaluation.demonstrations == "classifier":
        return _evaluate_shipped(recipe, adapter, shipped, on_progress, on_stage, ranks)
    experiment = prepare(recipe, adapter, on_stage=on_stage)
    _agree(experiment, adapter, ranks)
    named = "model, " if adapter is None else "with adapter, "
    measured = experiment.measure_all(on_progress, ranks, lambda what: tell(named + what))
    base = None
    if adapter is not None:
        adapters.detach(experiment.loaded.model)
        base = experiment.measure_all(on_progress, ranks, lambda what: tell(f"base model, {what}"))
    return document(experiment, measured, adapter=adapter, base=base)


def _agree(experiment: Experiment, adapter: adapters.Source | None, ranks: Ranks) -> None:
    """Check that all ranks measure the same."""
    if ranks.size > 1:
        tasks = (experiment.task, *experiment.trained_tasks, *experiment.others)
        fingerprint = facts.fingerprint(experiment.recipe, experiment.loaded, tasks)
        attached = "" if adapter is None else facts.weights_fingerprint(adapter.folder)
        ranks.agree(fingerprint + attached, "recipe, model, adapter, data or version")


def _evaluate_shipped(
    recipe: recipes.Recipe,
    adapter: adapters.Source | None,
    shipped: prediction.Shipped | None,
    on_progress: Callable[[int, int], None] | None,
    on_stage: Callable[[str], None] | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Measure what predict uses: a run's own demonstrations, or ones chosen as finetune does."""
    run: dict[str, Any] = {}
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
    experiment = prepare(recipe, adapter, on_stage=on_stage, trained_on=trained_on)
    if trained_on:
        _check_rows(experiment, run)
    _agree(experiment, adapter, ranks)
    if not len(experiment.splits.test):
        raise DataError(
            f"{recipe.data.source} has no test rows (data.holdout is {recipe.data.holdout}); give "
            "other labelled texts with --data"
        )
    if shipped is not None:
        predictor = shipped.predictor(
            experiment.loaded.model, experiment.builder, recipe.evaluation.batch_tokens
        )
    else:
        (on_stage or _nothing)("choosing demonstrations")
        predictor, _ = shipping.choose(experiment, on_progress=on_progress)
    return evaluate_classifier(
        experiment, predictor, adapter, on_progress=on_progress, on_stage=on_stage, ranks=ranks
    )


def _check_rows(experiment: Experiment, run: dict[str, Any]) -> None:
    """See that no row that a run was trained on is measured, as far as its facts tell."""
    known, section = run["data"], experiment.recipe.data
    if known["fingerprint"] == experiment.texts.fingerprint():
        rows = {name: len(some) for name, some in experiment.splits.rows.items()}
        same = (known.get("rows", rows), run["seeds"]["data"]) == (rows, section.seed)
    else:
        same = Path(section.source).resolve() != Path(known["source"]).resolve()
    if not same:
        raise DataError(
            f"{section.source}, or how it is divided, is not what it was when this run was "
            "trained, so rows that it was trained on would be measured; put that back, or give "
            "other labelled texts with --data"
        )


def heads(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    *,
    prompts: int = HEADS_PROMPTS,
    detectors: bool = True,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Heads:
    """See what a model's heads do on test prompts, without and with an adapter.

    Args:
        recipe: names model, data and prompts.
        adapter: a run folder, an adapter folder, a hub id, or None.
        prompts: how many test prompts to look at; as many as there are where these are fewer.
        detectors: also score every head on repeated random tokens.
        on_stage: told what is opened or looked at.
        on_progress: told how many prompts of how many are done, random rows among them.

    Returns:
        State ``before`` and, with an adapter, ``after``.
    """
    adapter = None if adapter is None else adapters.find(adapter)
    experiment = prepare(recipe, adapter, on_stage=on_stage)
    (on_stage or _nothing)("looking at heads")
    return experiment.heads(
        experiment.test_prompts(prompts)[:prompts],
        detectors=detectors,
        adapter=None if adapter is None else adapter.name,
        on_progress=on_progress,
    )


def _nothing(what: str) -> None:
    del what
