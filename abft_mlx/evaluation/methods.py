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
from abft_mlx.evaluation.forward import Outputs, hidden_states, label_scores, vocabulary_logits
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
_ANCHORED = ("hidden", "knn")
DOMAIN_WORDS = 64
BATCH_PROMPTS = 128
NEIGHBOURS = 3
SMALLEST_SUM = 1e-5
# Logits of a prompt that are put into float64 at a time.
_PIECE = 8192


def zero_shot_prompts(task: Task, section: EvaluationSection) -> list[Prompt]:
    """The test queries without demonstrations, one prompt each."""
    asked = task.splits.test.pairs()[: task.test_queries(section)]
    return [
        task.builder.build([], *query, where=f"zero-shot prompt {number}")
        for number, query in enumerate(asked)
    ]


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
        prompts: N test prompts of the task, in the order of evaluation; prompt i has query i modulo
            the number of queries.
        section: methods and sizes.
        events: who hears what is asked, and how many prompts of how many are done, calibration
            prompts included.
        ranks: the processes that measure together; each gets the same.

    Returns:
        For each method (N, C) float64.

    Raises:
        PromptError: a calibration prompt cannot be built.
    """
    events, names = events or Events(), list(dict.fromkeys(section.methods))
    # All prompts first: one that cannot be built shows before the model works.
    asked: dict[str, Sequence[Prompt]] = {**_extra_prompts(task, names, section)}
    if set(names) - {"zero_shot"}:
        asked[BASE] = prompts
    total, done = sum(map(len, asked.values())), 0
    found: dict[str, np.ndarray] = {}
    hidden: dict[str, mx.array] = {}
    for name, some in asked.items():
        events.stage("test" if name == BASE else name.replace("_", "-"))
        values = found[name] = np.zeros((len(some), len(task.space)))

        def read(part: Outputs, values: np.ndarray = values) -> None:
            values[part.rows] = softmax(label_scores(model, part, task.space))

        def progress(more: int, _: int, done: int = done) -> None:
            events.progress(done + more, total)

        states = hidden_states(
            model,
            some,
            space=task.space,
            batch_tokens=section.batch_tokens,
            each=read,
            on_progress=progress,
            ranks=ranks,
        )
        if "anchors" in asked and name in ("anchors", BASE):
            hidden[name] = states
        done += len(some)
    if "zero_shot" in names:
        found["zero_shot"] = found["zero_shot"][np.arange(len(prompts)) % len(found["zero_shot"])]
    for name in {"contextual", "domain"} & set(names):
        found[name] = divided(found[BASE], found[name])
    if "batch" in names:
        found["batch"] = batch(found[BASE])
    if "anchors" in asked:
        gold = np.array([prompt.gold for prompt in asked["anchors"]])
    if "hidden" in names:
        found["hidden"] = nearest_centroid(found[BASE], hidden[BASE], hidden["anchors"], gold)
    if "knn" in names:
        found["knn"] = neighbour_votes(
            vocabulary_logits(model, hidden[BASE]),
            vocabulary_logits(model, hidden["anchors"]),
            gold,
            len(task.space),
        )
    return {name: found[name] for name in names}


def entry(
    probabilities: np.ndarray, gold: np.ndarray, groups: np.ndarray, section: EvaluationSection
) -> dict[str, Any]:
    """One method of eval's JSON.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
        groups: (N,) which prompts belong together: the number of each one's query.
        section: bootstrap samples, seed and compat.

    Returns:
        The metrics; ``interval``, low and high end of each, unless bootstrap_samples is 0; and
        ``right``, N characters 0 or 1, with which any two measurements can be compared.
    """
    compat = section.compat
    made = summary(probabilities, gold, compat=compat)
    if section.bootstrap_samples:
        made["interval"] = intervals(
            probabilities, gold, groups, section.bootstrap_samples, section.seed, compat=compat
        )
    return made | {"right": right_string(probabilities, gold)}


def report(
    probabilities: Mapping[str, np.ndarray],
    gold: np.ndarray,
    groups: np.ndarray,
    section: EvaluationSection,
) -> dict[str, Any]:
    """What several methods are worth, and how they compare.

    Args:
        probabilities: for each method (N, C), of the same prompts.
        gold: (N,) label indices.
        groups: (N,) which prompts belong together: the number of each one's query.
        section: bootstrap samples, seed and compat.

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


def _extra_prompts(
    task: Task, names: Sequence[str], section: EvaluationSection
) -> dict[str, list[Prompt]]:
    """The prompts that methods need besides the test prompts."""
    made = {}
    if "zero_shot" in names:
        made["zero_shot"] = zero_shot_prompts(task, section)
    if "contextual" in names:
        made["contextual"] = contextual_prompts(task, section.calibration_prompts, section.seed)
    if "domain" in names:
        made["domain"] = domain_prompts(task, section.calibration_prompts, section.seed)
    if set(names) & set(_ANCHORED):
        made["anchors"] = anchor_prompts(task, section.anchor_prompts, section.seed)
    return made


def drawn_rows(n: int, each: int, pool: int, seed: int = 42) -> list[tuple[int, ...]]:
    """Rows of the calibration split, ``each`` for n prompts, drawn with repetition in one go."""
    drawn = Generator(seed).draw(pool, n * each, repetition=True)
    return [tuple(drawn[i * each : (i + 1) * each]) for i in range(n)]


def random_words(generator: Generator, texts: Sequence[str], count: int) -> str:
    """A query of random words of random texts, joined by spaces.

    Both picks leave out the last choice, as StaICC's do: the last text is never picked, nor a
    text's last word, unless it is the only one. The generator goes on from where it is.
    """
    words = []
    for _ in range(count):
        choice = texts[generator.integers(0, len(texts) - 1)].split(" ")
        words.append(choice[generator.integers(0, len(choice) - 1)])
    return " ".join(words)


def domain_queries(texts: Sequence[str], n: int, words: int, seed: int = 42) -> list[str]:
    """N queries of random words, in the words of the domain but without its sense.

    As in the benchmark, one generator runs through all queries.
    """
    generator = Generator(seed)
    return [random_words(generator, texts, words) for _ in range(n)]


def contextual_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """N prompts that ask for the label of nothing: K demonstrations and an empty query."""
    return _asking(task, [""] * n, seed, "contextual calibration")


def domain_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """N prompts that ask for the label of 64 random words of the task's own texts."""
    queries = domain_queries(task.splits.training.texts, n, DOMAIN_WORDS, seed)
    return _asking(task, queries, seed, "domain calibration")


def anchor_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """N prompts with known labels: K demonstrations and a query, all from the training split."""
    pairs = task.splits.training.pairs()
    made = []
    for number, rows in enumerate(drawn_rows(n, task.demonstrations + 1, len(pairs), seed)):
        *shown, query = (pairs[row] for row in rows)
        where = f"anchor prompt {number} (training rows {', '.join(map(str, rows))})"
        made.append(task.builder.build(shown, *query, where=where))
    return made


def _asking(task: Task, queries: Sequence[str], seed: int, what: str) -> list[Prompt]:
    """A prompt for each query, with demonstrations from the training split."""
    builder, pairs = task.builder_for(allow_empty=True), task.splits.training.pairs()
    rows = drawn_rows(len(queries), task.demonstrations, len(pairs), seed)
    return [
        builder.build([pairs[row] for row in shown], query, 0, where=f"{what} prompt {number}")
        for number, (shown, query) in enumerate(zip(rows, queries, strict=True))
    ]


def divided(probabilities: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Contextual and domain calibration: softmax of p over the mean p of prompts without content.

    Args:
        probabilities: (N, C).
        reference: (n, C) probabilities of the prompts without content.
    """
    return softmax(probabilities / ((SMALLEST_SUM + reference.sum(axis=0)) / len(reference)))


def batch(probabilities: np.ndarray) -> np.ndarray:
    """Batch calibration: softmax of (N, C) p, in evaluation order, minus its batch's mean p.

    Batches are of 128 consecutive prompts; what remains is a batch of its own. (The method's
    authors take log p; StaICC takes p.)
    """
    pieces = [
        probabilities[start : start + BATCH_PROMPTS]
        for start in range(0, len(probabilities), BATCH_PROMPTS)
    ]
    return np.concatenate([softmax(piece - piece.mean(axis=0)) for piece in pieces])


def nearest_centroid(
    probabilities: np.ndarray, hidden: mx.array, anchors: mx.array, gold: np.ndarray
) -> np.ndarray:
    """Hidden calibration: softmax over labels j of (d_0 - d_j), distances to the labels' centroids.

    Args:
        probabilities: (N, C), returned unchanged if some label has no anchor.
        hidden: (N, width) hidden states of the prompts at the last position.
        anchors: (n, width) hidden states of the anchor prompts.
        gold: (n,) their labels.
    """
    labels = probabilities.shape[1]
    if len(np.unique(gold)) < labels:
        return probabilities
    # NumPy knows no bfloat16.
    known = np.array(anchors.astype(mx.float32), dtype=np.float64)
    asked = np.array(hidden.astype(mx.float32), dtype=np.float64)
    centroids = [known[gold == label].mean(axis=0) for label in range(labels)]
    away = [np.linalg.norm(asked - centroid, axis=1) for centroid in centroids]
    distance = np.stack(away, axis=1)
    return softmax(distance[:, :1] - distance)


def neighbour_votes(
    logits: Iterable[mx.array], anchors: Iterable[mx.array], gold: np.ndarray, labels: int
) -> np.ndarray:
    """kNN-prompting: softmax of the votes of the three nearest anchors, of equals the first.

    Args:
        logits: pieces (B, V) of the prompts' whole-vocabulary logits at the last position; one is
            held at a time.
        anchors: pieces (B, V) of the anchors'; all n are held.
        gold: (n,) the anchors' labels.
        labels: C.

    Returns:
        (N, C) float64.
    """
    known = np.concatenate([np.array(piece, dtype=np.float32) for piece in anchors])
    # Distances stay the same, and squares of what all have in common no longer drown them.
    middle = known.mean(axis=0, dtype=np.float64)
    votes = []
    for piece in logits:
        away = _squared_distances(np.array(piece, dtype=np.float32), known, middle)
        # Equal anchors are equally far, whatever their sums' last bits.
        away = np.round(away / max(away.max(), 1e-300), 12)
        nearest = gold[np.argsort(away, axis=1, kind="stable")[:, :NEIGHBOURS]]
        votes.append(np.stack([(nearest == label).sum(axis=1) for label in range(labels)], axis=1))
    return softmax(np.concatenate(votes))


def _squared_distances(asked: np.ndarray, known: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """(B, n) float64 squared distances of rows (B, V) and (n, V), less a common (V,)."""
    away = np.zeros((len(asked), len(known)))
    for start in range(0, len(middle), _PIECE):
        some = slice(start, start + _PIECE)
        ours, theirs = (rows[:, some] - middle[some] for rows in (asked, known))
        away += (ours**2).sum(axis=1)[:, None] + (theirs**2).sum(axis=1) - 2 * ours @ theirs.T
    return away
