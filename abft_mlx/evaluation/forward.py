"""Forward passes over prompts: label probabilities, without logits of prompts × vocabulary.

All that a method of prediction needs can be had from the hidden state at the last position, which
is small: label logits, centroids and, a few prompts at a time, logits of the whole vocabulary.
Prompts that show the same demonstrations are computed behind these.

Letters: B prompts of a batch, N prompts in all, T tokens, C labels, V vocabulary. A label word of
several tokens goes through the model behind the cached prompt: R rows of at most w tokens, M nodes
(positions in the rows, no two of them behind the same tokens) whose predictions are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import ports, read_out, runtime
from abft_mlx.errors import RunError
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.prefix import AttendedPrefix, Prefix, Prefixes, cacheable
from abft_mlx.prompts import PADDING_TOKEN, LabelSpace, Prompt, PromptBatch, batches
from abft_mlx.ranks import Ranks

Progress = Callable[[int, int], None]
Found = TypeVar("Found")

# Prompts whose hidden states, gathered from all ranks, are handed on at a time.
TOGETHER = 512
# Widths are rounded up to this; behind a beginning prompts are short, and 32 would be half of them.
BUCKET, BUCKET_BEHIND = 32, 8
# Prompts with the same demonstrations that make it worth a pass of its own over these.
WORTH = 4
# Numbers in one piece of whole-vocabulary logits: 64 MiB of float32.
PIECE = 2**24


class Outputs(NamedTuple):
    """What a batch of prompts gives.

    Attributes:
        rows: (B,) where each prompt was among all prompts.
        hidden: (B, width) hidden states at the last position, after the final norm.
        later: (B, C) float64, log-probability of each class's tokens behind the first; None where
            every word is one token.
    """

    rows: np.ndarray
    hidden: mx.array
    later: np.ndarray | None


def label_probabilities(
    model: nn.Module,
    prompts: Sequence[Prompt],
    space: LabelSpace,
    *,
    batch_tokens: int,
    prefix: Prefix | None = None,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Softmax over the classes' scores: the sum of log p over the tokens of each label word.

    Where every word is one token, that is the softmax over the label tokens' logits at each
    prompt's last position.

    Args:
        model: a loaded model.
        prompts: N prompts of any lengths.
        space: the labels.
        batch_tokens: tokens in one batch, padding and the prefix included.
        prefix: spares the tokens that it holds, for prompts that begin with it.
        on_progress: called with the number of prompts done and of all, after each batch.
        ranks: the processes that measure together, each of which gets all.

    Returns:
        (N, C) float64, in the order of ``prompts``.
    """
    probabilities = np.zeros((len(prompts), len(space)))
    for part in hidden_batches(
        model,
        prompts,
        batch_tokens=batch_tokens,
        space=space,
        prefix=prefix,
        on_progress=on_progress,
        ranks=ranks,
    ):
        probabilities[part.rows] = softmax(label_scores(model, part, space))
    return probabilities


def label_logits(model: nn.Module, tokens: mx.array, last: mx.array, labels: mx.array) -> mx.array:
    """Logits of the label tokens at each prompt's last position.

    The head is computed at the last position and for the label tokens only.

    Args:
        model: a loaded model.
        tokens: (B, T) right-padded token ids.
        last: (B,) index of each prompt's last token.
        labels: (C,) label token ids.

    Returns:
        (B, C) float32.
    """
    return ports.port_for(model).logits(model, hidden_at_last(model, tokens, last), labels)


def label_scores(model: nn.Module, outputs: Outputs, space: LabelSpace) -> np.ndarray:
    """Scores of the classes: log-probabilities of their words, up to a constant of each prompt.

    The constant is the normaliser of the first token, which no comparison of classes needs.

    Args:
        model: a loaded model.
        outputs: of B prompts, made for the same space.
        space: the labels.

    Returns:
        (B, C), float32 logits where every word is one token, else float64.
    """
    first = mx.array(space.first_ids)
    logits = np.array(ports.port_for(model).logits(model, outputs.hidden, first))
    return logits if outputs.later is None else logits.astype(np.float64) + outputs.later


def check_finite(values: np.ndarray) -> None:
    """See that a model's answers are numbers.

    Args:
        values: (N, C) probabilities or scores of N texts.

    Raises:
        RunError: some are not finite.
    """
    broken = int((~np.isfinite(values).all(axis=1)).sum())
    if broken:
        raise RunError(
            f"{broken} of {len(values)} texts get no finite probabilities: weights of the model "
            "are not finite, or too large for its number type; take another copy of it, or another "
            "model"
        )


def hidden_at_last(
    model: nn.Module, tokens: mx.array, last: mx.array, prefix: Prefixes | None = None
) -> mx.array:
    """Hidden state after the final norm at each prompt's last position.

    Args:
        model: a loaded model.
        tokens: (B, T) right-padded token ids.
        last: (B,) index of each prompt's last token.
        prefix: the beginning that stands before the tokens, computed already.

    Returns:
        (B, width) in the model's own number type.
    """
    hidden = prefix.hidden(tokens) if prefix else ports.port_for(model).hidden(model, tokens)
    return mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def hidden_states(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int,
    space: LabelSpace | None = None,
    each: Callable[[Outputs], None] | None = None,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> mx.array:
    """Hidden states at the last position of all prompts.

    Args:
        model: a loaded model.
        prompts: N prompts, at least one, all with the same number of demonstrations.
        batch_tokens: tokens in one batch, padding included.
        space: as for ``hidden_batches``.
        each: called with every batch, as ``hidden_batches`` yields them.
        on_progress: called with the number of prompts done and of all, after each batch.
        ranks: the processes that measure together, each of which gets all.

    Returns:
        (N, width) in the model's own number type, in the order of ``prompts``.
    """
    found = []
    for part in hidden_batches(
        model, prompts, batch_tokens=batch_tokens, space=space, on_progress=on_progress, ranks=ranks
    ):
        if each is not None:
            each(part)
        found.append(part)
    order = np.argsort(np.concatenate([part.rows for part in found]))
    states = mx.concatenate([part.hidden for part in found])[mx.array(order)]
    mx.eval(states)
    return states


def hidden_batches(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int,
    space: LabelSpace | None = None,
    prefix: Prefix | None = None,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Outputs]:
    """Hidden states at the last position, batch after batch, and what label scores need beside.

    Every rank computes a part of the prompts, and yields all of them.

    Args:
        model: a loaded model.
        prompts: N prompts of any lengths, all with the same number of demonstrations.
        batch_tokens: tokens in one batch, padding and beginnings included.
        space: the labels, where their words are to be scored: words of several tokens are then
            run behind each prompt.
        prefix: spares the tokens that it holds, for prompts that begin with it.
        on_progress: called with the number of prompts done and of all, after each batch.
        ranks: the processes that measure together, each with the same prompts.

    Yields:
        Each batch's rows, hidden states and scores of later tokens.

    Raises:
        RunError: a rank is gone.
    """
    ranks = ranks or Ranks()
    words = None if space is None or space.single else Continuations(space.targets)
    share = own_rows(prompts, ranks)
    own = [prompts[row] for row in share]
    mine: list[Outputs] = []
    done = 0
    for rows, beginning in _sharing(model, own, prefix):

        def run(batch: PromptBatch, beginning: Prefix | None = beginning) -> Outputs:
            tokens = mx.array(batch.tokens)
            if words is None:
                hidden = hidden_at_last(model, tokens, mx.array(batch.last), beginning)
                mx.eval(hidden)
                return Outputs(batch.rows, hidden, None)
            known = beginning if beginning is not None else Prefixes(model, [])
            hidden, asked = known.extended(tokens)
            return Outputs(batch.rows, hidden, words.scores(asked, batch_tokens))

        size = 0 if beginning is None else len(beginning)
        for whole in _batches([own[row] for row in rows], size, batch_tokens):
            # Words go on behind a prompt's last token, so there may be no padding.
            for batch in [whole] if words is None else whole.of_one_length():
                for found in in_halves(model, run, batch):
                    places = rows[found.rows]
                    part = found._replace(rows=share[places])
                    if len(own) == len(prompts):
                        yield part
                    else:
                        mine.append(part)
                    done += len(places)
                    if on_progress is not None:
                        on_progress(done * len(prompts) // len(own), len(prompts))
    if mine:
        yield from _gathered(mine, len(prompts), ranks)


def own_rows(prompts: Sequence[Prompt], ranks: Ranks) -> np.ndarray:
    """Where the prompts are that this rank computes; all of them where there are too few for all.

    What begins alike is adjacent, so that few demonstrations are computed by two ranks.
    """
    n = len(prompts)
    if n < ranks.size or ranks.size == 1:
        return np.arange(n)
    order = sorted(range(n), key=lambda row: prompts[row].token_ids)
    return np.array(order[n * ranks.rank // ranks.size : n * (ranks.rank + 1) // ranks.size])


def _sharing(
    model: nn.Module, prompts: Sequence[Prompt], prefix: Prefix | None
) -> Iterator[tuple[np.ndarray, Prefix | None]]:
    """Where prompts are that are computed whole, and those behind the same demonstrations."""
    if prefix is not None:
        behind = np.array([prefix.begins(prompt) for prompt in prompts], dtype=bool)
        for rows, beginning in ((np.flatnonzero(~behind), None), (np.flatnonzero(behind), prefix)):
            if len(rows):
                yield rows, beginning
        return
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        shown = prompt.label_positions[-1] + 1 if prompt.label_positions else 0
        groups.setdefault(prompt.token_ids[:shown], []).append(row)
    able = len(groups) < len(prompts) and cacheable(model)
    shared = {t: group for t, group in groups.items() if able and t and len(group) >= WORTH}
    alone = sorted(row for t, group in groups.items() if t not in shared for row in group)
    if alone:
        yield np.array(alone), None
    for tokens, group in shared.items():
        yield np.array(group), Prefix(model, tokens)


def _batches(prompts: Sequence[Prompt], size: int, batch_tokens: int) -> list[PromptBatch]:
    """Batches of what prompts are behind a beginning of so many tokens."""
    if not size:
        # On a CPU batches of whole prompts are smaller, so that one is done within seconds.
        return batches(prompts, max_tokens=runtime.batch_tokens(batch_tokens), bucket_tokens=BUCKET)
    return batches(
        [replace(prompt, token_ids=prompt.token_ids[size:]) for prompt in prompts],
        max_tokens=batch_tokens,
        bucket_tokens=BUCKET_BEHIND,
        cached_tokens=size,
    )


def in_halves(
    model: nn.Module, run: Callable[[PromptBatch], Found], batch: PromptBatch
) -> Iterator[Found]:
    """What a forward pass gives of a batch, or of its halves where memory runs out.

    Args:
        model: that runs.
        run: evaluates a batch.
        batch: B prompts.

    Raises:
        RunError: a single prompt does not fit into memory.
    """
    del model
    waiting = [batch]
    while waiting:
        some = waiting.pop()
        try:
            found = run(some)
        except (RuntimeError, MemoryError) as error:
            if not runtime.out_of_memory(error):
                raise
            words = str(error) or type(error).__name__
        else:
            yield found
            continue
        if len(some) == 1:
            raise RunError(
                f"a prompt of {len(some.tokens[0])} tokens does not fit into memory ({words}); "
                "take a 4-bit copy of the model, or fewer prompt.demonstrations"
            )
        runtime.release_memory()
        waiting += reversed(some.halves())


def _gathered(mine: list[Outputs], n: int, ranks: Ranks) -> Iterator[Outputs]:
    """All ranks' outputs, some prompts at a time; what a rank has not computed is zero."""
    states = mx.zeros((n, mine[0].hidden.shape[1]), dtype=mine[0].hidden.dtype)
    later = None if mine[0].later is None else np.zeros((n, mine[0].later.shape[1]))
    for part in mine:
        states[mx.array(part.rows)] = part.hidden
        if later is not None:
            later[part.rows] = part.later
    # float32 carries every narrower number and its sum with zeros exactly.
    if later is None:
        (states,) = ranks.sum([states])
    else:
        states, summed = ranks.sum([states, mx.array(later.astype(np.float32))])
        later = np.array(summed, dtype=np.float64)
    for start in range(0, n, TOGETHER):
        some = slice(start, min(start + TOGETHER, n))
        rows = np.arange(some.start, some.stop)
        yield Outputs(rows, states[some], None if later is None else later[some])


def read_out_probabilities(
    model: nn.Module,
    prompts: Sequence[Prompt],
    classes: int,
    *,
    batch_tokens: int,
    prefix: AttendedPrefix | None = None,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Softmax of the scores that a read-out (:mod:`abft_mlx.read_out`) gives, not centred.

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
    share = own_rows(prompts, ranks)
    own = [prompts[row] for row in share]
    probabilities = np.zeros((len(prompts), classes))
    done = 0

    def run(batch: PromptBatch) -> tuple[np.ndarray, np.ndarray]:
        rows = behind.rows(mx.array(batch.tokens), mx.array(batch.last))
        positions, labels = mx.array(batch.label_positions), mx.array(batch.demonstration_labels)
        scores = np.array(weights.scores(rows, positions, labels, classes))
        return batch.rows, softmax(scores.astype(np.float64))

    for whole in _batches(own, len(behind), batch_tokens):
        for places, found in in_halves(model, run, whole):
            probabilities[share[places]] = found
            done += len(places)
            if on_progress is not None:
                on_progress(done * len(prompts) // len(own), len(prompts))
    if len(own) < len(prompts):
        (summed,) = ranks.sum([mx.array(probabilities.astype(np.float32))])
        probabilities = np.array(summed, dtype=np.float64)
    return probabilities


class Continuations:
    """The targets of all classes as rows of tokens, each beginning of a word computed once.

    Attributes:
        rows: (R, w) int32 tokens that are put behind a prompt, padded on the right.
        node_row: (M,) the row of each node.
        node_place: (M,) its position there.
        read: (Q, 3) node, class and token: every token but the first of every target.
    """

    def __init__(self, targets: Sequence[tuple[int, ...]]) -> None:
        """Lay out the targets, of which one at least has several tokens."""
        inputs = sorted({one[:-1] for one in targets if len(one) > 1})
        # In this order what begins another stands right before one that it begins.
        kept = [
            one
            for one, other in zip(inputs, [*inputs[1:], ()], strict=True)
            if other[: len(one)] != one
        ]
        self.classes = len(targets)
        self.rows = np.full((len(kept), max(map(len, kept))), PADDING_TOKEN, dtype=np.int32)
        nodes: dict[tuple[int, ...], int] = {}
        places = []
        for row, one in enumerate(kept):
            self.rows[row, : len(one)] = one
            for place in range(len(one)):
                if one[: place + 1] not in nodes:
                    nodes[one[: place + 1]] = len(nodes)
                    places.append((row, place))
        self.node_row, self.node_place = np.array(places).T
        self.read = np.array(
            [
                (nodes[one[:place]], number, one[place])
                for number, one in enumerate(targets)
                for place in range(1, len(one))
            ]
        )

    def scores(self, prompts: Prefixes, batch_tokens: int) -> np.ndarray:
        """Log-probability of each class's tokens behind the first, (B, C) float64.

        Args:
            prompts: B prompts of T tokens, computed.
            batch_tokens: tokens in one batch, the prompts' tokens included.
        """
        found = np.zeros((len(prompts.beginnings), self.classes))
        rows = max(1, batch_tokens // (len(prompts) + self.rows.shape[1]))
        several = max(1, rows // len(self.rows))
        for first in range(0, len(found), several):
            asked = np.arange(first, min(first + several, len(found)))
            for start in range(0, len(self.rows), rows):
                self._add(found, prompts, asked, slice(start, start + rows))
        return found

    def _add(self, found: np.ndarray, prompts: Prefixes, asked: np.ndarray, some: slice) -> None:
        """Run some rows behind some prompts, and add what their nodes predict."""
        rows = self.rows[some]
        nodes = np.flatnonzero(
            (self.node_row >= some.start) & (self.node_row < some.start + len(rows))
        )
        hidden = prompts.branches(mx.array(rows), asked.tolist())
        chosen = hidden[
            :,
            mx.array(self.node_row[nodes] - some.start),
            mx.array(self.node_place[nodes]),
        ]
        read = self.read[np.isin(self.read[:, 0], nodes)]
        state = np.arange(len(asked))[:, None] * len(nodes) + np.searchsorted(nodes, read[:, 0])
        token = np.broadcast_to(read[:, 2], state.shape)
        values, done = np.zeros(state.shape), 0
        for logits in vocabulary_logits(prompts.model, chosen.reshape(-1, chosen.shape[-1])):
            here = (state >= done) & (state < done + len(logits))
            at = mx.array(state[here] - done)
            total = mx.logsumexp(logits, axis=1)
            values[here] = np.array(logits[at, mx.array(token[here])] - total[at])
            done += len(logits)
        for one, label in zip(values.T, read[:, 1], strict=True):
            found[asked, label] += one


def vocabulary_logits(model: nn.Module, hidden: mx.array) -> Iterator[mx.array]:
    """Logits of the whole vocabulary, of as many states at a time as make a small array.

    Args:
        model: a loaded model.
        hidden: (N, width) hidden states.

    Yields:
        (B, V) float32, in order; B · V is at most PIECE, or B is 1.
    """
    port = ports.port_for(model)
    several = max(1, PIECE // ports.output_dims(port.head(model)))
    for start in range(0, len(hidden), several):
        logits = port.logits(model, hidden[start : start + several])
        mx.eval(logits)
        yield logits
