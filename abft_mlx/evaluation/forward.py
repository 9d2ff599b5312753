"""Forward passes over prompts: label scores, without logits of prompts × vocabulary.

Every method of prediction needs only the hidden state at the last position, which is small. Prompts
that show the same demonstrations are computed behind these.

Letters: B prompts of a batch, N prompts in all, C labels, V vocabulary. Label words of several
tokens run through the model behind the computed prompt: R rows of at most w tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Required, TypedDict, Unpack

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import ports, read_out, runtime
from abft_mlx.errors import RunError
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.prefix import Branches, Prefix, cacheable
from abft_mlx.prompts import PADDING_TOKEN, LabelSpace, Prompt, PromptBatch, batches
from abft_mlx.ranks import Ranks

Progress = Callable[[int, int], None]
Compute = Callable[[PromptBatch, Prefix], tuple[mx.array, ...]]
"""Arrays with a row for each prompt of a batch, whose tokens stand behind a prefix."""

# Widths are rounded up to this; behind a prefix prompts are short, and 32 would be half of them.
BUCKET, BUCKET_BEHIND = 32, 8
# Prompts with the same demonstrations that are worth a pass of its own over these.
WORTH = 4
# Numbers in one piece of whole-vocabulary logits: 64 MiB of float32.
PIECE = 2**24


@dataclass(frozen=True)
class Outputs:
    """What a model gives for N prompts.

    Attributes:
        hidden: (N, width) hidden states at the last position, after the final norm.
        later: (N, C) float32, log-probability of each class's tokens behind the first; None where
            every word is one token.
    """

    hidden: mx.array
    later: mx.array | None = None


class Options(TypedDict, total=False):
    """How prompts are run.

    Attributes:
        batch_tokens: tokens in one batch, padding and the prefix included.
        prefix: what all prompts begin with; None finds prompts that share their demonstrations.
        on_progress: called with the number of prompts done and of all, after each batch.
        ranks: the processes that measure together, each with the same prompts; each gets all.
    """

    batch_tokens: Required[int]
    prefix: Prefix | None
    on_progress: Progress | None
    ranks: Ranks | None


def label_probabilities(
    model: nn.Module, prompts: Sequence[Prompt], space: LabelSpace, **options: Unpack[Options]
) -> np.ndarray:
    """Softmax over the classes' scores: the sum of log p over the tokens of each label word.

    Args:
        model: a loaded model.
        prompts: N prompts, at least one, all with the same number of demonstrations.
        space: the labels.
        options: ``batch_tokens``, and if wanted ``prefix``, ``on_progress`` and ``ranks``; see
            ``Options``.

    Returns:
        (N, C) float64, in the order of ``prompts``.
    """
    return softmax(label_scores(model, outputs(model, prompts, space, **options), space))


def label_scores(model: nn.Module, result: Outputs, space: LabelSpace) -> np.ndarray:
    """(N, C) log-probabilities of the label words, up to a constant of each prompt.

    The constant is the normaliser of the first token, which no comparison of classes needs.
    """
    first = mx.array(space.first_ids)
    logits = np.array(ports.port_for(model).logits(model, result.hidden, first), np.float64)
    return logits if result.later is None else logits + np.array(result.later)


def check_finite(values: np.ndarray) -> None:
    """Raise RunError if some of (N, C) probabilities or scores are not finite."""
    broken = int((~np.isfinite(values).all(axis=1)).sum())
    if broken:
        raise RunError(
            f"{broken} of {len(values)} texts get no finite probabilities: weights of the model "
            "are not finite, or too large for its number type; take another copy of it, or another "
            "model"
        )


def outputs(
    model: nn.Module,
    prompts: Sequence[Prompt],
    space: LabelSpace | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """Run prompts through a model.

    Args:
        model: a loaded model.
        prompts: N prompts, at least one, all with the same number of demonstrations.
        space: the labels, if their words are to be scored: words of several tokens are then run
            behind each prompt.
        options: as for `label_probabilities`.

    Raises:
        RunError: a prompt does not fit into memory, or a rank is gone.
    """
    words = None if space is None or space.longest == 1 else _LabelWords(space.targets)

    def compute(batch: PromptBatch, prefix: Prefix) -> tuple[mx.array, ...]:
        tokens = mx.array(batch.tokens)
        if words is None:
            return (hidden_at_last(tokens, mx.array(batch.last), prefix),)
        hidden, branches = prefix.extended(tokens)
        return hidden, words.scores(branches, len(prefix), options["batch_tokens"])

    return Outputs(*_run(model, prompts, compute, padded=words is None, **options))


def hidden_at_last(tokens: mx.array, last: mx.array, prefix: Prefix) -> mx.array:
    """(B, width) hidden states at (B,) last positions of (B, T) right-padded tokens."""
    return mx.take_along_axis(prefix.hidden(tokens), last[:, None, None], axis=1)[:, 0]


def read_out_probabilities(
    model: nn.Module, prompts: Sequence[Prompt], classes: int, **options: Unpack[Options]
) -> np.ndarray:
    """Softmax of the scores that a model's read-out (:mod:`abft_mlx.read_out`) gives, not centred.

    Returns:
        (N, C) float64, in the order of ``prompts``.
    """
    weights = read_out.of(model)
    assert weights is not None

    def compute(batch: PromptBatch, prefix: Prefix) -> tuple[mx.array, ...]:
        rows = prefix.rows(mx.array(batch.tokens), mx.array(batch.last))
        positions, labels = mx.array(batch.label_positions), mx.array(batch.demonstration_labels)
        return (weights.scores(rows, positions, labels, classes),)

    return softmax(np.array(_run(model, prompts, compute, **options)[0]))


def _run(
    model: nn.Module,
    prompts: Sequence[Prompt],
    compute: Compute,
    *,
    batch_tokens: int,
    prefix: Prefix | None = None,
    padded: bool = True,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> list[mx.array]:
    """What is computed of all prompts, in their order; batches without padding on request."""
    n, ranks = len(prompts), ranks or Ranks()
    own = own_rows(prompts, ranks)
    order: list[np.ndarray] = []
    parts: list[tuple[mx.array, ...]] = []
    for rows, beginning in _groups(model, prompts, own, prefix):
        some = [prompts[row] for row in rows]
        for batch in _batches(some, len(beginning), batch_tokens, padded):
            for part, arrays in _in_halves(model, compute, batch, beginning):
                order.append(rows[part.rows])
                parts.append(arrays)
                if on_progress is not None:
                    on_progress(sum(map(len, order)) * n // len(own), n)
    places = mx.array(np.concatenate(order))
    results = []
    for column in zip(*parts, strict=True):
        values = mx.concatenate(column)
        # What a rank has not computed is zero.
        result = mx.zeros((n, *values.shape[1:]), values.dtype)
        result[places] = values
        results.append(result)
    mx.eval(results)
    return ranks.sum(results) if len(own) < n else results


def own_rows(prompts: Sequence[Prompt], ranks: Ranks) -> np.ndarray:
    """Numbers of the prompts that this rank computes; all of them where there are too few for all.

    Prompts that begin alike go to one rank, so that few demonstrations are computed twice.
    """
    n = len(prompts)
    if n < ranks.size or ranks.size == 1:
        return np.arange(n)
    order = sorted(range(n), key=lambda row: prompts[row].token_ids)
    return np.array(order[n * ranks.rank // ranks.size : n * (ranks.rank + 1) // ranks.size])


def _groups(
    model: nn.Module, prompts: Sequence[Prompt], rows: np.ndarray, prefix: Prefix | None
) -> Iterator[tuple[np.ndarray, Prefix]]:
    """Numbers of prompts, and the prefix that they stand behind: their demonstrations, or none."""
    if prefix is not None:
        yield rows, prefix
        return
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows.tolist():
        positions = prompts[row].label_positions
        shown = positions[-1] + 1 if positions else 0
        groups.setdefault(prompts[row].token_ids[:shown], []).append(row)
    able = len(groups) < len(rows) and cacheable(model)
    shared = {t: group for t, group in groups.items() if able and t and len(group) >= WORTH}
    alone = sorted(row for t, group in groups.items() if t not in shared for row in group)
    if alone:
        yield np.array(alone), Prefix(model)
    for tokens, group in shared.items():
        yield np.array(group), Prefix(model, tokens)


def _batches(
    prompts: Sequence[Prompt], prefix: int, batch_tokens: int, padded: bool
) -> list[PromptBatch]:
    """Batches of prompts without the tokens of their prefix."""
    if prefix:
        prompts = [replace(prompt, token_ids=prompt.token_ids[prefix:]) for prompt in prompts]
    else:
        # On a CPU batches of whole prompts are smaller, so that one is done within seconds.
        batch_tokens = runtime.batch_tokens(batch_tokens)
    result = batches(
        prompts,
        max_tokens=batch_tokens,
        bucket_tokens=BUCKET_BEHIND if prefix else BUCKET,
        cached_tokens=prefix,
    )
    # Label words go on behind a prompt's last token, so there may be no padding.
    return result if padded else [part for batch in result for part in batch.of_one_length()]


def _in_halves(
    model: nn.Module, compute: Compute, batch: PromptBatch, prefix: Prefix
) -> list[tuple[PromptBatch, tuple[mx.array, ...]]]:
    """What is computed of a batch, or of its halves where memory runs out."""
    try:
        arrays = compute(batch, prefix)
        mx.eval(arrays)
        return [(batch, arrays)]
    except (RuntimeError, MemoryError) as error:
        if not runtime.out_of_memory(error):
            raise
        words = str(error) or type(error).__name__
    if len(batch) == 1:
        raise RunError(
            f"a prompt of {len(prefix) + batch.tokens.shape[1]} tokens does not fit into memory "
            f"({words}); take a 4-bit copy of the model, or fewer prompt.demonstrations"
        )
    runtime.release_memory()
    return [
        result for half in batch.halves() for result in _in_halves(model, compute, half, prefix)
    ]


class _LabelWords:
    """The targets of all classes as rows of tokens that are put behind a prompt.

    Attributes:
        rows: (R, w) int32 tokens, padded on the right.
        reads: (reads, 4) row, position, class and token: what is read of the rows is the
            log-probability of every token but the first of every target.
    """

    def __init__(self, targets: Sequence[tuple[int, ...]]) -> None:
        """Lay out the targets, of which at least one has several tokens."""
        inputs = sorted({target[:-1] for target in targets if len(target) > 1})
        self.classes = len(targets)
        self.rows = np.full((len(inputs), max(map(len, inputs))), PADDING_TOKEN, dtype=np.int32)
        for row, word in zip(self.rows, inputs, strict=True):
            row[: len(word)] = word
        self.reads = np.array(
            [
                (inputs.index(target[:-1]), place - 1, label, target[place])
                for label, target in enumerate(targets)
                for place in range(1, len(target))
            ]
        )

    def scores(self, prompts: Branches, prefix: int, batch_tokens: int) -> mx.array:
        """Log-probability of each class's tokens behind the first, (B, C) float32.

        Args:
            prompts: B prompts, computed.
            prefix: tokens before the prompts' own.
            batch_tokens: tokens in one batch, the prompts' tokens included.
        """
        count, length = prompts.tokens.shape
        scores = np.zeros((count, self.classes))
        rows = max(1, batch_tokens // (prefix + length + self.rows.shape[1]))
        several = max(1, rows // len(self.rows))
        for first in range(0, count, several):
            chosen = slice(first, first + several)
            for start in range(0, len(self.rows), rows):
                some = self.rows[start : start + rows]
                hidden = prompts.hidden(mx.array(some), chosen)
                row, place, label, token = self.reads[
                    (self.reads[:, 0] >= start) & (self.reads[:, 0] < start + len(some))
                ].T
                hidden = hidden[:, mx.array(row - start), mx.array(place)]
                values = self._log_probabilities(prompts.model, hidden, token)
                for column, value in zip(label, values.T, strict=True):
                    scores[chosen, column] += value
        return mx.array(scores, dtype=mx.float32)

    @staticmethod
    def _log_probabilities(model: nn.Module, hidden: mx.array, token: np.ndarray) -> np.ndarray:
        """(B, reads) log-probabilities of (reads,) tokens, from (B, reads, width) states."""
        B, reads, width = hidden.shape
        wanted, values = mx.array(np.tile(token, B)), np.zeros(B * reads)
        done = 0
        for logits in vocabulary_logits(model, hidden.reshape(B * reads, width)):
            part = slice(done, done + len(logits))
            chosen = mx.take_along_axis(logits, wanted[part, None], axis=1)[:, 0]
            values[part] = np.array(chosen - mx.logsumexp(logits, axis=1))
            done = part.stop
        return values.reshape(B, reads)


def vocabulary_logits(model: nn.Module, hidden: mx.array) -> Iterator[mx.array]:
    """Logits of the whole vocabulary, of as many of (N, width) states at a time as are small.

    Yields:
        (B, V) float32, in order; B · V is at most PIECE, or B is 1.
    """
    port = ports.port_for(model)
    several = max(1, PIECE // ports.output_dims(port.head(model)))
    for start in range(0, len(hidden), several):
        logits = port.logits(model, hidden[start : start + several])
        mx.eval(logits)
        yield logits
