"""Calibrated predictions without training: as the StaICC benchmark does it.

Calibration prompts come from the training split, which is the protocol's calibration split. Their
rows are drawn with repetition by the protocol's generator, afresh for each method.
Letters: N prompts, n calibration prompts, K demonstrations, C labels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from abft_mlx.data import Generator
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.prompts import Prompt
from abft_mlx.task import Task

DOMAIN_WORDS = 64
BATCH_PROMPTS = 128
NEIGHBOURS = 3
SMALLEST_SUM = 1e-5
# Anchors that are looked at closely, for each neighbour wanted.
_CANDIDATES = 4
_EPSILON = float(np.finfo(np.float32).eps)


def drawn_rows(n: int, each: int, pool: int, seed: int = 42) -> list[tuple[int, ...]]:
    """Rows of the calibration split for n prompts, drawn with repetition in one go.

    Args:
        n: prompts.
        each: rows of a prompt: K demonstrations, and one more where the query is a row, too.
        pool: rows to choose from.
        seed: 42 is the protocol's.
    """
    drawn = Generator(seed).draw(pool, n * each, repetition=True)
    return [tuple(drawn[i * each : (i + 1) * each]) for i in range(n)]


def random_words(generator: Generator, texts: Sequence[str], count: int) -> str:
    """A query of random words of random texts, joined by spaces.

    Both picks leave out the last choice, as StaICC's do: the last text is never picked, nor a
    text's last word, unless it is the only one.

    Args:
        generator: goes on from where it is.
        texts: where the words come from.
        count: words.
    """
    words = []
    for _ in range(count):
        choice = texts[generator.integers(0, len(texts) - 1)].split(" ")
        words.append(choice[generator.integers(0, len(choice) - 1)])
    return " ".join(words)


def domain_queries(texts: Sequence[str], n: int, words: int, seed: int = 42) -> list[str]:
    """N queries of random words, in the words of the domain but without its sense.

    As in the benchmark, one generator runs through all queries.

    Args:
        texts: where the words come from.
        n: queries.
        words: words of a query.
        seed: 42 is StaICC's.
    """
    generator = Generator(seed)
    return [random_words(generator, texts, words) for _ in range(n)]


def contextual_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """Prompts that ask for the label of nothing: K demonstrations and an empty query.

    Args:
        task: its training split is drawn from.
        n: prompts.
        seed: 42 is the protocol's.

    Raises:
        PromptError: a prompt cannot be built.
    """
    return _asking(task, [""] * n, seed, "contextual calibration")


def domain_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """Prompts that ask for the label of 64 random words of the task's own texts.

    Args:
        task: its training split is drawn from.
        n: prompts.
        seed: 42 is the protocol's; of the demonstrations, and afresh of the words.

    Raises:
        PromptError: a prompt cannot be built.
    """
    queries = domain_queries(task.splits.training.texts, n, DOMAIN_WORDS, seed)
    return _asking(task, queries, seed, "domain calibration")


def anchor_prompts(task: Task, n: int, seed: int = 42) -> list[Prompt]:
    """Prompts with known labels: K demonstrations and a query, all from the training split.

    Args:
        task: its training split is drawn from.
        n: prompts.
        seed: 42 is the protocol's.

    Raises:
        PromptError: a prompt cannot be built.
    """
    pairs = task.splits.training.pairs()
    made = []
    for number, rows in enumerate(drawn_rows(n, task.demonstrations + 1, len(pairs), seed)):
        *shown, query = (pairs[row] for row in rows)
        where = f"anchor prompt {number} (training rows {', '.join(map(str, rows))})"
        made.append(task.builder.build(shown, *query, where=where))
    return made


def _asking(task: Task, queries: Sequence[str], seed: int, what: str) -> list[Prompt]:
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

    Returns:
        (N, C) float64.
    """
    return softmax(probabilities / ((SMALLEST_SUM + reference.sum(axis=0)) / len(reference)))


def batch(probabilities: np.ndarray) -> np.ndarray:
    """Batch calibration: softmax of p minus the mean p of its batch.

    Batches are of 128 consecutive prompts; what remains is a batch of its own. (The method's
    authors take log p; StaICC takes p.)

    Args:
        probabilities: (N, C) in the order of evaluation.

    Returns:
        (N, C) float64.
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

    Returns:
        (N, C) float64.
    """
    labels = probabilities.shape[1]
    if len(np.unique(gold)) < labels:
        return probabilities
    # NumPy knows no bfloat16.
    known = np.array(anchors.astype(mx.float32), dtype=np.float64)
    asked = np.array(hidden.astype(mx.float32), dtype=np.float64)
    centroids = [known[gold == label].mean(axis=0) for label in range(labels)]
    distance = np.stack([np.linalg.norm(asked - one, axis=1) for one in centroids], axis=1)
    return softmax(distance[:, :1] - distance)


def neighbour_votes(
    logits: Iterable[mx.array], anchors: Iterable[mx.array], gold: np.ndarray, labels: int
) -> np.ndarray:
    """kNN-prompting: softmax of the votes of the three nearest anchors.

    Args:
        logits: pieces (B, V) of the prompts' whole-vocabulary logits at the last position; one is
            held at a time.
        anchors: pieces (B, V) of the anchors'; all n are held.
        gold: (n,) the anchors' labels.
        labels: C.

    Returns:
        (N, C) float64.
    """
    known = mx.concatenate(list(anchors))
    # Distances stay the same, and squares of what all have in common no longer drown them.
    middle = known.mean(axis=0)
    known = known - middle
    mx.eval(known)
    votes = []
    for piece in logits:
        nearest = gold[_nearest(piece - middle, known)]
        votes.append(np.stack([(nearest == label).sum(axis=1) for label in range(labels)], axis=1))
    return softmax(np.concatenate(votes))


def _nearest(asked: mx.array, known: mx.array) -> np.ndarray:
    """The nearest rows of ``known`` (n, V) to each of ``asked`` (B, V); of equals the first.

    Expanded squares choose candidates, with one product and nothing of B · n · V; differences,
    which lose no digits, decide among these.

    Returns:
        (B, NEIGHBOURS), or (B, n) where there are fewer anchors.
    """
    n = known.shape[0]
    several = min(NEIGHBOURS, n)
    squares, own = (known * known).sum(axis=1), (asked * asked).sum(axis=1)
    rough = squares - 2 * (asked @ known.T)
    # What sums of V rounded numbers may be wrong by, of what stands farthest from the middle.
    largest = squares.max() + 2 * mx.sqrt(squares.max() * own.max())
    slack = 2 * _EPSILON * math.sqrt(known.shape[1]) * largest
    bound = mx.sort(rough, axis=1)[:, several - 1, None] + slack
    doubtful = int((rough <= bound).sum(axis=1).max().item())
    some = min(max(NEIGHBOURS * _CANDIDATES, doubtful), n)
    candidates = mx.sort(mx.argpartition(rough, some - 1, axis=1)[:, :some], axis=1)
    columns = []
    for column in range(some):
        difference = asked - known[candidates[:, column]]
        columns.append((difference * difference).sum(axis=1))
        mx.eval(columns[-1])
    order = np.argsort(np.array(mx.stack(columns, axis=1)), axis=1, kind="stable")[:, :several]
    return np.take_along_axis(np.array(candidates), order, axis=1)
