"""Log-probabilities of label words of several tokens: what comes after their first token.

The score of a class is the sum of log p over the tokens of its word behind the prompt. The first
token of every word is predicted at the prompt's last position, so its normaliser is the same for
all classes and cancels. The others are read here: the words go through the model behind the cached
prompt, one row for each word that does not begin another.

Letters: B prompts of T tokens, C classes, R rows of at most w tokens, M nodes: positions in the
rows, no two of them behind the same tokens, whose predictions are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import ports
from abft_mlx.prefix import Prefixes
from abft_mlx.prompts import PADDING_TOKEN

# Numbers in one piece of whole-vocabulary logits: 64 MiB of float32.
PIECE = 2**24


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
