"""Ways to predict labels with one model, side by side on the same prompts.

Calibration without training is as the StaICC benchmark does it: its prompts come from the training
split, and their rows are drawn with repetition by the protocol's generator, afresh for each method.

Letters: N prompts, n calibration prompts, K demonstrations, C labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx.data import Generator
from abft_mlx.evaluation.forward import label_scores, outputs, vocabulary_logits
from abft_mlx.evaluation.metrics import (
    intervals,
    mcnemar,
    predictions,
    right_string,
    softmax,
    summary,
)
from abft_mlx.events import Events
from abft_mlx.prompts import Prompt
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection
from abft_mlx.task import Task

BASE = "vanilla"
DOMAIN_WORDS = 64
BATCH_PROMPTS = 128
NEIGHBOURS = 3
SMALLEST_SUM = 1e-5
# Logits of a prompt that are put into float64 at a time.
_PIECE = 8192


def probabilities_of(
    model: nn.Module,
    task: Task,
    prompts: Sequence[Prompt],
    section: EvaluationSection,
    events: Events | None = None,
    ranks: Ranks | None = None,
) -> dict[str, np.ndarray]:
    """Label probabilities of the test prompts by every method of a section.

    All methods but zero_shot look at the same forward pass over ``prompts``.

    Args:
        model: a loaded model.
        task: what the prompts are of.
        prompts: N test prompts in the order of evaluation; prompt i has query i modulo the number
            of queries.
        section: methods and sizes.
        events: hears how many prompts of how many are done, calibration prompts included.
        ranks: the processes that measure together; each gets the same.

    Returns:
        For each method (N, C) float64.
    """
    events, names = events or Events(), list(dict.fromkeys(section.methods))
    anchored = "hidden" in names or "knn" in names
    # All prompts first: one that cannot be built shows before the model works.
    sets: dict[str, Sequence[Prompt]] = {}
    if "zero_shot" in names:
        sets["zero_shot"] = zero_shot_prompts(task, section)
    if "contextual" in names:
        sets["contextual"] = contextual_prompts(task, section.calibration_prompts, section.seed)
    if "domain" in names:
        sets["domain"] = domain_prompts(task, section.calibration_prompts, section.seed)
    if anchored:
        sets["anchors"] = anchor_prompts(task, section.anchor_prompts, section.seed)
    if names != ["zero_shot"]:
        sets[BASE] = prompts
    total, done = sum(map(len, sets.values())), 0
    results: dict[str, np.ndarray] = {}
    hidden: dict[str, mx.array] = {}
    for name, some in sets.items():
        events.stage("test" if name == BASE else name.replace("_", "-"))

        def progress(more: int, _: int, done: int = done) -> None:
            events.progress(done + more, total)

        result = outputs(
            model,
            some,
            task.space,
            batch_tokens=section.batch_tokens,
            on_progress=progress,
            ranks=ranks,
        )
        results[name] = softmax(label_scores(model, result, task.space))
        hidden[name] = result.hidden
        done += len(some)
    if "zero_shot" in names:
        zero_shot = results["zero_shot"]
        results["zero_shot"] = zero_shot[np.arange(len(prompts)) % len(zero_shot)]
    for name in {"contextual", "domain"} & set(names):
        results[name] = divided(results[BASE], results[name])
    if "batch" in names:
        results["batch"] = batch(results[BASE])
    if anchored:
        gold = np.array([prompt.gold for prompt in sets["anchors"]])
    if "hidden" in names:
        results["hidden"] = nearest_centroid(results[BASE], hidden[BASE], hidden["anchors"], gold)
    if "knn" in names:
        results["knn"] = neighbour_votes(
            vocabulary_logits(model, hidden[BASE]),
            vocabulary_logits(model, hidden["anchors"]),
            gold,
            len(task.space),
        )
    return {name: results[name] for name in names}


def entry(
    probabilities: np.ndarray, gold: np.ndarray, groups: np.ndarray, section: EvaluationSection
) -> dict[str, Any]:
    """One method of eval's JSON, from (N, C) probabilities and (N,) gold labels.

    (N,) groups say which prompts belong together: the number of each one's query.

    Returns:
        The metrics; ``interval``, low and high end of each, unless bootstrap_samples is 0; and
        ``right``, N characters 0 or 1, with which any two measurements can be compared.
    """
    result = summary(probabilities, gold, compat=section.compat)
    samples, seed = section.bootstrap_samples, section.seed
    if samples:
        result["interval"] = intervals(
            probabilities, gold, groups, samples, seed, compat=section.compat
        )
    return result | {"right": right_string(probabilities, gold)}


def report(
    probabilities: Mapping[str, np.ndarray],
    gold: np.ndarray,
    groups: np.ndarray,
    section: EvaluationSection,
) -> dict[str, Any]:
    """What several methods are worth, and how they compare; arguments are those of :func:`entry`.

    Returns:
        ``methods``, an `entry` for each, and ``comparisons``: exact McNemar tests of every other
        method against vanilla, where that was measured.
    """
    right = {name: predictions(values) == gold for name, values in probabilities.items()}
    return {
        "methods": {
            name: entry(values, gold, groups, section) for name, values in probabilities.items()
        },
        "comparisons": [
            {"first": name, "second": BASE} | mcnemar(right[name], right[BASE])
            for name in right
            if BASE in right and name != BASE
        ],
    }


def zero_shot_prompts(task: Task, section: EvaluationSection) -> list[Prompt]:
    """The test queries without demonstrations, one prompt each."""
    queries = task.splits.test.pairs()[: task.test_queries(section)]
    return [
        task.builder.build([], *query, where=f"zero-shot prompt {number}")
        for number, query in enumerate(queries)
    ]


def drawn_rows(n: int, each: int, pool: int, seed: int = 42) -> list[tuple[int, ...]]:
    """Rows of the calibration split, ``each`` for n prompts, drawn with repetition in one go."""
    drawn = Generator(seed).draw(pool, n * each, repetition=True)
    return [tuple(drawn[i * each : (i + 1) * each]) for i in range(n)]


def domain_queries(texts: Sequence[str], n: int, words: int, seed: int = 42) -> list[str]:
    """N queries of random words of random texts: the domain's words without its sense.

    As in the benchmark, one generator runs through all queries, and both picks leave out the last
    choice: the last text is never picked, nor a text's last word, unless it is the only one.
    """
    generator = Generator(seed)

    def word() -> str:
        choice = texts[generator.integers(0, len(texts) - 1)].split(" ")
        return choice[generator.integers(0, len(choice) - 1)]

    return [" ".join(word() for _ in range(words)) for _ in range(n)]


def contextual_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """N prompts that ask for the label of nothing: K demonstrations and an empty query."""
    return _prompts_for(task, [""] * n, seed, "contextual calibration")


def domain_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """N prompts that ask for the label of 64 random words of the task's own texts."""
    queries = domain_queries(task.splits.training.texts, n, DOMAIN_WORDS, seed)
    return _prompts_for(task, queries, seed, "domain calibration")


def anchor_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """N prompts with known labels: K demonstrations and a query, all from the training split."""
    pairs = task.splits.training.pairs()
    prompts = []
    for number, rows in enumerate(drawn_rows(n, task.demonstrations + 1, len(pairs), seed)):
        *shown, query = (pairs[row] for row in rows)
        where = f"anchor prompt {number} (training rows {', '.join(map(str, rows))})"
        prompts.append(task.builder.build(shown, *query, where=where))
    return prompts


def _prompts_for(task: Task, queries: Sequence[str], seed: int, what: str) -> list[Prompt]:
    """A prompt for each query, with demonstrations from the training split."""
    builder, pairs = task.builder_for(allow_empty=True), task.splits.training.pairs()
    rows = drawn_rows(len(queries), task.demonstrations, len(pairs), seed)
    return [
        builder.build([pairs[row] for row in shown], query, 0, where=f"{what} prompt {number}")
        for number, (shown, query) in enumerate(zip(rows, queries, strict=True))
    ]


def divided(probabilities: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Contextual and domain calibration: softmax of (N, C) p over the mean of a (n, C) reference.

    The reference are probabilities of prompts without content.
    """
    return softmax(probabilities / ((SMALLEST_SUM + reference.sum(axis=0)) / len(reference)))


def batch(probabilities: np.ndarray) -> np.ndarray:
    """Batch calibration: softmax of (N, C) p, in evaluation order, minus its batch's mean p.

    Batches are of 128 consecutive prompts; what remains is a batch of its own. (The method's
    authors take log p; StaICC takes p.)
    """
    starts = range(0, len(probabilities), BATCH_PROMPTS)
    pieces = [probabilities[start : start + BATCH_PROMPTS] for start in starts]
    return np.concatenate([softmax(piece - piece.mean(axis=0)) for piece in pieces])


def nearest_centroid(
    probabilities: np.ndarray, hidden: mx.array, anchors: mx.array, gold: np.ndarray
) -> np.ndarray:
    """Hidden calibration: softmax over labels j of (d_0 - d_j), distances to the labels' centroids.

    (N, C) probabilities are returned unchanged if some label has no anchor. Hidden states at the
    last position are (N, width) of the prompts, (n, width) of the anchors with (n,) gold labels.
    """
    labels = probabilities.shape[1]
    if len(np.unique(gold)) < labels:
        return probabilities
    # NumPy has no bfloat16.
    queries = np.array(hidden.astype(mx.float32), dtype=np.float64)
    references = np.array(anchors.astype(mx.float32), dtype=np.float64)
    centroids = [references[gold == label].mean(axis=0) for label in range(labels)]
    distance = np.stack([np.linalg.norm(queries - mean, axis=1) for mean in centroids], axis=1)
    return softmax(distance[:, :1] - distance)


def neighbour_votes(
    logits: Iterable[mx.array], anchors: Iterable[mx.array], gold: np.ndarray, labels: int
) -> np.ndarray:
    """kNN-prompting: softmax of the votes of the three nearest anchors, of equals the first.

    Whole-vocabulary logits at the last position come in pieces (B, V): of the prompts one is held
    at a time, of the anchors, with (n,) gold labels, all. Returns (N, C) float64.
    """
    references = np.concatenate([np.array(piece, dtype=np.float32) for piece in anchors])
    # Distances stay the same, and squares of what all have in common no longer drown them.
    middle = references.mean(axis=0, dtype=np.float64)
    votes = []
    for piece in logits:
        queries = np.array(piece, dtype=np.float32)
        distance = np.zeros((len(queries), len(references)))
        for start in range(0, len(middle), _PIECE):
            some = slice(start, start + _PIECE)
            left, right = (rows[:, some] - middle[some] for rows in (queries, references))
            distance += (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
        # Equal anchors are equally far, whatever their sums' last bits.
        distance = np.round(distance / max(distance.max(), 1e-300), 12)
        nearest = gold[np.argsort(distance, axis=1, kind="stable")[:, :NEIGHBOURS]]
        votes.append((nearest[:, :, None] == np.arange(labels)).sum(axis=1))
    return softmax(np.concatenate(votes))
