"""A prompt cut to a few lines, with the attention that one head's last row gives each piece.

Letters: L layers, H query heads, T tokens, K demonstrations.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.cells import cell_len, set_cell_size

from abft_mlx.induction import Example, Heads

# A prompt's part, demonstration or query, is never cut to less.
_SHORTEST_PART_CELLS = 14
_LONGEST_TOKEN_CELLS = 24
# Of a part that is too long, what its end gets: that is where its label is.
_END_SHARE = 0.6
START = "⟨start⟩"
ELLIPSIS = "…"


@dataclass(frozen=True)
class Chosen:
    """The head that is shown.

    Attributes:
        layer: its layer.
        head: its number there.
        correctness: mean mass on right labels minus wrong ones, in each state.
    """

    layer: int
    head: int
    correctness: tuple[float, ...]


@dataclass(frozen=True)
class Piece:
    """A token, or an ellipsis for several.

    Attributes:
        text: safe to print.
        right: of a label token, whether it is the query's gold label; None for any other.
        weights: attention in each state; an ellipsis has the sum of what it stands for.
    """

    text: str
    right: bool | None
    weights: tuple[float, ...]


def choose(heads: Heads) -> Chosen | None:
    """The induction head whose correctness changed most; of one state, the strongest head.

    Args:
        heads: with one state or more; the first and the last are compared.

    Returns:
        None where no layer has heads.
    """
    states = list(heads.states.values())
    first, last = states[0], states[-1]
    score = abs(last.correctness - first.correctness) if len(states) > 1 else first.magnitude
    inducing = np.maximum(np.nan_to_num(first.share), np.nan_to_num(last.share)) > 0
    if np.isfinite(score[inducing]).any():
        score = np.where(inducing, score, np.nan)
    if not np.isfinite(score).any():
        return None
    layer, head = (int(one) for one in np.unravel_index(np.nanargmax(score), score.shape))
    return Chosen(layer, head, tuple(float(one.correctness[layer, head]) for one in states))


def typical(heads: Heads, chosen: Chosen) -> Example | None:
    """The example in which the head does most nearly what it does on average."""
    best, nearest = None, np.inf
    for example in heads.examples:
        signs = np.where(np.asarray(example.demonstration_labels) == example.gold, 1.0, -1.0)
        rows = [example.rows[name][chosen.layer, chosen.head] for name in heads.states]
        found = [float((row[example.label_positions] * signs).sum()) for row in rows]
        away = sum(abs(a - b) for a, b in zip(found, chosen.correctness, strict=True))
        if away < nearest:
            best, nearest = example, away
    return best


def pieces(
    example: Example, states: Sequence[str], layer: int, head: int, limit_cells: int
) -> list[Piece]:
    """The prompt in pieces whose texts take about ``limit_cells`` cells at most.

    What is left out is the middle of demonstrations and query, then whole demonstrations in the
    middle; labels that are shown are shown whole. Weights are kept: all pieces together have what
    the row has.

    Args:
        example: the prompt.
        states: names of the rows.
        layer: of the head.
        head: whose rows.
        limit_cells: terminal columns times lines.
    """
    rows = np.stack([np.asarray(example.rows[name])[layer, head] for name in states])
    labels = dict(
        zip(
            map(int, example.label_positions),
            (int(one) == example.gold for one in example.demonstration_labels),
            strict=True,
        )
    )
    tokens = _tokens(example.tokens, rows, labels)
    parts: list[list[Piece]] = [[]]
    for piece in tokens:
        parts[-1].append(piece)
        if piece.right is not None:
            parts.append([])
    parts = [part for part in parts if part]
    fit = max(2, limit_cells // _SHORTEST_PART_CELLS)
    if len(parts) > fit:
        before, after = fit // 2, len(parts) - (fit - fit // 2)
        left_out = [piece for part in parts[before:after] for piece in part]
        parts = [*parts[:before], [_together(left_out)], *parts[after:]]
    widths = [sum(cell_len(piece.text) for piece in part) for part in parts]
    level = max(_level(widths, limit_cells), _SHORTEST_PART_CELLS)
    return [piece for part in parts for piece in _cut(part, level)]


def clean(text: str) -> str:
    """A text without anything that a terminal obeys: controls, escapes, changes of direction."""
    made = []
    for character in text:
        if character == "\n":
            made.append("⏎ ")
        elif character == "\t":
            made.append(" ")
        elif unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp"):
            made.append("·")
        elif unicodedata.category(character) != "Cf":
            made.append(character)
    cleaned = "".join(made)
    return cleaned if cell_len(cleaned) or not text else "·"


def _tokens(texts: Sequence[str], rows: np.ndarray, labels: dict[int, bool]) -> list[Piece]:
    """A piece for each token; one without text, half a character, counts with the next."""
    made, carried = [], np.zeros(len(rows))
    for place, text in enumerate(texts):
        weights = carried + rows[:, place]
        if not text and place + 1 < len(texts) and place not in labels:
            if place:
                carried = weights
                continue
            text = START
        carried = np.zeros(len(rows))
        shown = clean(text)
        if cell_len(shown) > _LONGEST_TOKEN_CELLS:
            shown = set_cell_size(shown, _LONGEST_TOKEN_CELLS - 1) + ELLIPSIS
        made.append(Piece(shown, labels.get(place), tuple(float(one) for one in weights)))
    return made


def _together(some: Sequence[Piece]) -> Piece:
    sums = np.sum([piece.weights for piece in some], axis=0)
    return Piece(f" {ELLIPSIS}", None, tuple(float(one) for one in sums))


def _level(widths: Sequence[int], limit: int) -> int:
    """The width to which the widest parts must be cut so that all together fit."""
    left, rest = limit, sorted(widths)
    while rest:
        if rest[0] * len(rest) > left:
            return left // len(rest)
        left -= rest.pop(0)
    return limit


def _cut(part: list[Piece], width: int) -> list[Piece]:
    """A part without its middle, if it is wider than it may be; its last token stays."""
    sizes = [cell_len(piece.text) for piece in part]
    if sum(sizes) <= width:
        return part
    end, used = len(part) - 1, sizes[-1]
    while end > 0 and used + sizes[end - 1] <= width * _END_SHARE:
        end -= 1
        used += sizes[end]
    begin, room = 0, width - used - len(ELLIPSIS) - 2
    while begin < end and sizes[begin] <= room:
        room -= sizes[begin]
        begin += 1
    if begin == end:
        return part
    return [*part[:begin], _together(part[begin:end]), *part[end:]]
