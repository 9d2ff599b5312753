"""What a recipe asks to be measured of a model: accuracy, bias, robustness, unseen, transfer.

Bias (which labels a model leans to, how much it learns from demonstrations' labels) and robustness
(how often it keeps to its answer when wording or demonstrations change) are StaICC-DIAG's, without
the faults of its code; ``compat`` repeats them (docs/evaluation.md). Unseen labels are the paper's
A.4 and figure 3, transfer its AccOD (table 2).

StaICC writes a label prefix with the space that follows it ("sentiment: "), and applying one of its
templates undoes the form in which that space belongs to the label. Here the label always brings its
space, so a prefix has none ("sentiment:") and all nine prompts keep that form.

Letters: N prompts, C labels, K demonstrations, R repetitions of a query, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.data import Generator, fold
from abft_mlx.errors import DataError, PromptError
from abft_mlx.evaluation import methods
from abft_mlx.evaluation.forward import Options, label_probabilities
from abft_mlx.evaluation.metrics import bootstrap_interval, predictions, softmax
from abft_mlx.events import Events
from abft_mlx.prompts import LabelSpace, Prompt, PromptBuilder, Template
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection, TaskSection
from abft_mlx.task import Task

# Of a domain-bias query.
WORDS = 128
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
# What the benchmark regresses on by mistake: it subtracts the growing rates from one another.
COMPAT_CORRECTNESS = (1.0, 0.75, 0.25, -0.5, -1.5)
TEMPLATE_QUERIES = 100
QUERIES, SETS = 128, 8
FACTORS = ("instruction", "input_prefix", "label_prefix", "label_affix")
# The orthogonal table: levels of the factors in nine templates. Every two levels of two factors
# meet once.
L9 = tuple((a, b, (a + b) % 3, (2 * a + b) % 3) for a in range(3) for b in range(3))
# The paper's sets need at most 34 draws a row on average. A pool that needs more than this would
# take hours; it is drawn from its other rows straight away, which has the same distribution.
LONGEST_SEARCH = 1000


@dataclass(frozen=True)
class Measurement:
    """A model as it is now, and how it is measured; events hear how many prompts are done."""

    model: nn.Module
    section: EvaluationSection
    events: Events
    ranks: Ranks | None = None

    def probabilities(
        self, prompts: Sequence[Prompt], space: LabelSpace, before: int = 0, total: int = 0
    ) -> np.ndarray:
        """(N, C) label probabilities of prompts, which follow ``before`` others of ``total``."""

        def progress(done: int, n: int) -> None:
            self.events.progress(before + done, total or n)

        options: Options = {
            "batch_tokens": self.section.batch_tokens,
            "on_progress": progress,
            "ranks": self.ranks,
        }
        return label_probabilities(self.model, prompts, space, **options)


def measure(
    model: nn.Module,
    task: Task,
    section: EvaluationSection,
    *,
    trained: Sequence[Task] = (),
    others: Sequence[Task] = (),
    events: Events | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a model as it is now, with an adapter or without.

    Args:
        model: a loaded model.
        task: what it is measured on.
        section: protocols, methods and sizes.
        trained: the tasks whose training texts transfer must not ask for; ``task`` if none.
        others: the tasks that the transfer protocol measures on.
        events: hears what is measured, and how many prompts of how many are done.
        ranks: the processes that measure together; each gets the same.

    Returns:
        The parts of eval's JSON that describe the model, one for each protocol asked for:
        ``methods`` and ``comparisons`` (accuracy), ``robustness``, ``bias``, ``unseen``,
        ``transfer``.
    """
    document: dict[str, Any] = {}
    vanilla, events = None, events or Events()
    measurement = Measurement(model, section, events, ranks)
    wanted = set(section.protocols)
    if wanted & {"accuracy", "bias"}:
        names = list(section.methods) if "accuracy" in wanted else []
        if "bias" in wanted and "vanilla" not in names:
            names.insert(0, "vanilla")
        events.stage("making test prompts")
        prompts = list(task.test_prompts(section))
        gold = np.array([prompt.gold for prompt in prompts])
        groups = np.arange(len(prompts)) % task.test_queries(section)
        chosen = section.model_copy(update={"methods": names})
        probabilities = methods.probabilities_of(model, task, prompts, chosen, events, ranks)
        vanilla = probabilities.get("vanilla")
        if "accuracy" in wanted:
            document |= methods.report(probabilities, gold, groups, section)
        if vanilla is not None and "bias" in wanted:
            events.stage("bias")
            document["bias"] = bias(measurement, task, vanilla, gold)
    if "robustness" in wanted:
        events.stage("robustness")
        document["robustness"] = robustness(measurement, task)
    if "unseen" in wanted:
        events.stage("unseen labels")
        document["unseen"] = unseen(measurement, task, vanilla)
    if "transfer" in wanted:
        document["transfer"] = transfer(measurement, others, trained or (task,))
    return document


def bias(
    measurement: Measurement, task: Task, vanilla: np.ndarray, gold: np.ndarray
) -> dict[str, Any]:
    """Contextual, domain and posterior bias, and what wrong labels of demonstrations do (GLER).

    ``vanilla`` are the (N, C) probabilities of the test prompts, ``gold`` their (N,) labels.

    Returns:
        ``contextual_entropy`` (empty query) and ``domain_entropy`` (random words) of the mean
        probabilities, to compare with ``maximum_entropy`` = ln C; ``posterior_kl``; ``gler``, the
        slope of accuracy against the share of right labels; ``gler_accuracy``, the accuracy at each
        rate of wrong labels.
    """
    section = measurement.section
    # At rate 0 labels are right: the vanilla prompts.
    parts = [*prior_prompts(task, section), *wrong_label_prompts(task, section)[1:]]
    prompts = [prompt for part in parts for prompt in part]
    probabilities = measurement.probabilities(prompts, task.space)
    empty, words, *rates = np.split(probabilities, len(parts))
    # Added up one by one: compat asks whether the mean sums to exactly 1.
    means = [np.cumsum(part, axis=0)[-1] / len(part) for part in (empty, words)]
    accuracies = [float((predictions(p) == gold).mean()) for p in (vanilla, *rates)]
    x = COMPAT_CORRECTNESS if section.compat else correctness(task.demonstrations)
    return {
        "contextual_entropy": entropy(means[0], compat=section.compat),
        "domain_entropy": entropy(means[1], compat=section.compat),
        "maximum_entropy": math.log(len(task.space)),
        "posterior_kl": posterior_kl(vanilla, gold),
        "gler": float(np.polyfit(x, accuracies, 1)[0]),
        "gler_accuracy": {str(rate): share for rate, share in zip(RATES, accuracies, strict=True)},
    }


def entropy(mean: np.ndarray, *, compat: bool = False) -> float:
    """Entropy in nats of a (C,) mean probability vector; ln C where no label is favoured.

    With ``compat`` the vector goes through a softmax first unless it sums to exactly 1.0, as in the
    benchmark.
    """
    if compat and float(np.cumsum(mean)[-1]) != 1.0:
        mean = softmax(mean)
    inside = mean[mean > 0]
    return float(-(inside * np.log(inside)).sum())


def posterior_kl(probabilities: np.ndarray, gold: np.ndarray) -> float | None:
    """KL divergence in nats of the mean probabilities from the gold labels' frequencies.

    None where it is infinite: some label is gold nowhere (the protocol has no smoothing).
    """
    mean = probabilities.mean(axis=0)
    frequency = np.bincount(gold, minlength=len(mean)) / len(gold)
    favoured = mean > 0
    if (frequency[favoured] == 0).any():
        return None
    return float((mean[favoured] * np.log(mean[favoured] / frequency[favoured])).sum())


def correctness(demonstrations: int) -> list[float]:
    """Share of right labels among K demonstrations at each wrong-label rate."""
    return [1 - int(demonstrations * rate) / demonstrations for rate in RATES]


def prior_prompts(task: Task, section: EvaluationSection) -> tuple[list[Prompt], list[Prompt]]:
    """N prompts with an empty query, and N with one of random words; gold label 0.

    The demonstrations are those of the test prompts; their split gives the words.
    """
    builder = task.builder_for(allow_empty=True)
    pool = task.splits.demonstrations.pairs()
    sets = [[pool[row] for row in rows] for rows in task.test_rows(section)]
    texts = task.splits.demonstrations.texts
    words = methods.domain_queries(texts, len(sets), WORDS, section.seed)

    def prompts(queries: Sequence[str], name: str) -> list[Prompt]:
        return [
            builder.build(shown, query, 0, where=f"{name}-bias prompt {i}")
            for i, (shown, query) in enumerate(zip(sets, queries, strict=True))
        ]

    return prompts([""] * len(sets), "contextual"), prompts(words, "domain")


def wrong_labels(
    rows: Sequence[tuple[int, ...]], labels: Sequence[int], classes: int, seed: int = 42
) -> list[list[tuple[int, ...]]]:
    """Labels of every prompt's demonstrations at each of the five wrong-label rates.

    At rate r, floor(K · r) demonstrations of each prompt, drawn without repetition, carry the label
    after their own, the last class the first; where a row stands in a prompt twice, both do. As in
    the benchmark's source, one generator runs through all prompts of a rate
    and on into the next: a label that is wrong at one rate need not be wrong at the next.

    From N rows of K indices into the demonstration split's class numbers, in evaluation order, to N
    rows of K class numbers for each rate. Seed 42 is StaICC's.
    """
    generator = Generator(seed)
    result = []
    for rate in RATES:
        shown = []
        for row in rows:
            wrong = {row[i] for i in generator.draw(len(row), int(len(row) * rate))}
            shown.append(tuple((labels[index] + (index in wrong)) % classes for index in row))
        result.append(shown)
    return result


def wrong_label_prompts(task: Task, section: EvaluationSection) -> list[list[Prompt]]:
    """For each of the five rates of wrong labels the N test prompts; those at rate 0 are plain."""
    rows, queries = task.test_rows(section), task.test_queries(section)
    pool, test = task.splits.demonstrations, task.splits.test.pairs()
    # Fixed demonstrations are wrong for all queries alike.
    each = queries if section.demonstrations == "fixed" else 1
    result = []
    drawn = wrong_labels(rows[::each], pool.labels, len(task.space), section.seed)
    for rate, labels in zip(RATES, drawn, strict=True):
        prompts = []
        for i, chosen in enumerate(rows):
            texts = [pool.texts[row] for row in chosen]
            shown = list(zip(texts, labels[i // each], strict=True))
            where = f"prompt {i} at wrong-label rate {rate}"
            prompts.append(task.builder.build(shown, *test[i % queries], where=where))
        result.append(prompts)
    return result


def robustness(measurement: Measurement, task: Task) -> dict[str, Any]:
    """Consistency of predictions over nine templates and over eight sets of demonstrations.

    Templates: the first 100 test rows with one set of demonstrations each (sampler rows 0-99).
    Demonstrations: the first 128 test rows, query q with sampler rows q, q + 128, ... q + 7 · 128.
    Fewer test rows, or a smaller ``section.queries``: as many as there are.

    Returns:
        ``template`` and ``demonstrations``, each with ``consistency`` (mean over queries of the
        modal share), ``accuracy`` of every repetition, ``queries``, and ``interval`` of the
        consistency (resampling queries) unless ``bootstrap_samples`` is 0.
    """
    section = measurement.section
    sets = [(builder.space, prompts) for builder, prompts in variant_prompts(task, section)]
    sets.append((task.space, list(redrawn_prompts(task, section))))
    total, done = sum(len(prompts) for _, prompts in sets), 0
    predicted = []
    for space, prompts in sets:
        predicted.append(predictions(measurement.probabilities(prompts, space, done, total)))
        done += len(prompts)
    labels = task.splits.test.labels
    return {
        "template": _consistency(np.stack(predicted[:-1]), labels, section),
        "demonstrations": _consistency(predicted[-1].reshape(SETS, -1), labels, section),
    }


def templates(section: TaskSection) -> tuple[Template, ...]:
    """The nine templates of a task; the first is the prompt's own."""
    own = Template.from_section(section.prompt)
    levels = {f: (getattr(own, f), *getattr(section.variants, f)) for f in FACTORS}
    return tuple(
        replace(own, **{f: levels[f][level] for f, level in zip(FACTORS, row, strict=True)})
        for row in L9
    )


def variant_prompts(
    task: Task, section: EvaluationSection
) -> list[tuple[PromptBuilder, list[Prompt]]]:
    """For each template its builder and the prompts of the first 100 test rows, or fewer.

    Query q has the demonstrations of sampler row q in every template.

    Raises:
        PromptError: a template makes no usable prompt; the message says which, and its wording.
    """
    size = {"queries": min(TEMPLATE_QUERIES, section.queries), "repeats": 1}
    smaller = section.model_copy(update=size)
    result = []
    for number, template in enumerate(templates(task.section)):
        try:
            builder = task.builder_for(template)
            prompts = list(replace(task, builder=builder).test_prompts(smaller))
        except PromptError as error:
            pieces = [f for f, level in zip(FACTORS, L9[number], strict=True) if level]
            words = ", ".join(f"{f} {getattr(template, f)!r}" for f in pieces) or "its own words"
            raise PromptError(f"template {number} of variants ({words}): {error}") from error
        result.append((builder, prompts))
    return result


def redrawn_prompts(task: Task, section: EvaluationSection) -> Sequence[Prompt]:
    """Eight prompts for each of the first test rows; query q in set r is prompt q + Q · r."""
    size = {"queries": min(QUERIES, section.queries), "repeats": SETS}
    return task.test_prompts(section.model_copy(update=size))


def modal_shares(predicted: np.ndarray) -> np.ndarray:
    """(Q,) float64: the share of each query's (R, Q) predictions that are its most frequent one."""
    counts = [(predicted == label).sum(axis=0) for label in range(int(predicted.max()) + 1)]
    return np.max(counts, axis=0) / len(predicted)


def _consistency(
    predicted: np.ndarray, labels: tuple[int, ...], section: EvaluationSection
) -> dict[str, Any]:
    """Consistency and accuracies of (R, Q) predictions for the first Q test rows."""
    queries = predicted.shape[1]
    shares = modal_shares(predicted)
    right = predicted == np.array(labels[:queries])
    result: dict[str, Any] = {
        "consistency": float(shares.mean()),
        "accuracy": right.mean(axis=1).tolist(),
        "queries": queries,
    }
    if section.bootstrap_samples:
        result["interval"] = list(
            bootstrap_interval(shares, np.arange(queries), section.bootstrap_samples, section.seed)
        )
    return result


def unseen(
    measurement: Measurement, task: Task, vanilla: np.ndarray | None = None
) -> dict[str, Any]:
    """Metrics with the protocol's demonstrations, with unseen labels, and with none.

    A model that only copies labels from its demonstrations gets no unseen prompt right.
    ``vanilla`` are the (N, C) probabilities of the test prompts, if they were computed already.

    Returns:
        ``random`` (the test prompts), ``unseen`` and ``zero_shot``, each a `methods.entry` of N
        prompts in the same order of queries.

    Raises:
        DataError: too few demonstration rows without some query's label.
    """
    section = measurement.section
    random = task.test_prompts(section)
    # No batch holds prompts with and without demonstrations.
    shown = [*(random if vanilla is None else ()), *unseen_prompts(task, section)]
    alone = methods.zero_shot_prompts(task, section)

    total = len(shown) + len(alone)
    together = measurement.probabilities(shown, task.space, 0, total)
    once = measurement.probabilities(alone, task.space, len(shown), total)
    results = {
        "random": together[: len(random)] if vanilla is None else vanilla,
        "unseen": together[-len(random) :],
        "zero_shot": np.tile(once, (section.repeats, 1)),
    }
    gold = np.array([prompt.gold for prompt in random])
    groups = np.arange(len(gold)) % len(alone)
    return {name: methods.entry(values, gold, groups, section) for name, values in results.items()}


def unseen_rows(
    labels: Sequence[int], gold: Sequence[int], repeats: int, k: int, seed: int = 42
) -> list[tuple[int, ...]]:
    """Rows of the demonstration pool for every test prompt, none with the query's label.

    As StaICC does it: the sampler's own rows first; then, in ascending order, every row that holds
    its query's label is drawn again, by the same generator, until it does not.

    ``labels`` are class numbers of the demonstration pool, with enough of other labels for every
    query, ``gold`` those of the queries. Rows repeat indices only where k > len(labels). Query q in
    repeat r has row q + len(gold) · r.
    """
    generator = Generator(seed)
    pool, again = len(labels), k > len(labels)
    rows = [tuple(generator.draw(pool, k, again)) for _ in range(len(gold) * repeats)]
    others = {label: [i for i in range(pool) if labels[i] != label] for label in sorted(set(gold))}
    for i, row in enumerate(rows):
        label = gold[i % len(gold)]
        left = len(others[label])
        tries = (pool / left) ** k if again else math.comb(pool, k) / math.comb(left, k)
        while any(labels[index] == label for index in row):
            if tries > LONGEST_SEARCH:
                row = tuple(others[label][index] for index in generator.draw(left, k, again))
            else:
                row = tuple(generator.draw(pool, k, again))
        rows[i] = row
    return rows


def unseen_prompts(task: Task, section: EvaluationSection) -> list[Prompt]:
    """The test prompts with demonstrations of labels other than the query's."""
    pool, k = task.splits.demonstrations, task.demonstrations
    queries = task.splits.test.pairs()[: task.test_queries(section)]
    gold = [label for _, label in queries]
    needed = 1 if k > len(pool) else k
    for label in sorted(set(gold)):
        others = sum(other != label for other in pool.labels)
        if others < needed:
            raise DataError(
                f"{pool.source}: {others} of {len(pool)} demonstration rows have a label other "
                f"than {pool.names[label]!r}, and unseen-label prompts need {needed} of them: add "
                "rows of other labels, lower prompt.demonstrations, or leave unseen out of "
                "evaluation.protocols"
            )
    # Fixed demonstrations are the same for all queries of a label.
    fixed = section.demonstrations == "fixed"
    drawn_for = sorted(set(gold)) if fixed else gold
    drawn = unseen_rows(pool.labels, drawn_for, section.repeats, k, section.seed)
    prompts = []
    for i in range(len(queries) * section.repeats):
        repeat, query = divmod(i, len(queries))
        place = drawn_for.index(gold[query]) if fixed else query
        rows = drawn[place + len(drawn_for) * repeat]
        shown = [(pool.texts[row], pool.labels[row]) for row in rows]
        prompts.append(task.builder.build(shown, *queries[query], where=f"unseen-label prompt {i}"))
    return prompts


def transfer(
    measurement: Measurement, others: Sequence[Task], trained: Sequence[Task]
) -> dict[str, Any]:
    """Measure a model on tasks that it was not trained on.

    Data sets share sentences (SST2, SST5, rotten tomatoes, subjective): a test query whose text,
    case and punctuation aside, lies in a training part is left out and counted.

    Returns:
        ``accuracy``, the plain mean over tasks (None where nothing is left), and ``tasks``: for
        each a `methods.entry`, the ``prompts`` counted, the ``shared_queries`` left out, and
        ``shared_demonstrations``, the counted prompts that show a text seen in training.
    """
    section = measurement.section
    trained_on = {
        fold(text)
        for task in trained
        for part in (task.splits.training, task.splits.validation)
        for text in part.texts
    }
    results: dict[str, Any] = {}
    for task in others:
        measurement.events.stage(f"transfer to {task.name}")
        prompts, rows = task.test_prompts(section), task.test_rows(section)
        queries = task.test_queries(section)
        shared = [fold(text) in trained_on for text in task.splits.test.texts[:queries]]
        shown = [fold(text) in trained_on for text in task.splits.demonstrations.texts]
        numbers = [i for i in range(len(prompts)) if not shared[i % queries]]
        result = results[task.name] = {
            "prompts": len(numbers),
            "shared_queries": sum(shared),
            "shared_demonstrations": sum(any(shown[row] for row in rows[i]) for i in numbers),
        }
        if numbers:
            chosen = [prompts[i] for i in numbers]
            probabilities = measurement.probabilities(chosen, task.space)
            gold = np.array([prompt.gold for prompt in chosen])
            groups = np.array([i % queries for i in numbers])
            result |= methods.entry(probabilities, gold, groups, section)
    measured = [result["accuracy"] for result in results.values() if "accuracy" in result]
    return {"accuracy": float(np.mean(measured)) if measured else None, "tasks": results}
