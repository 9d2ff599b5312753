"""What a model's heads look at, drawn in a terminal: a prompt shaded by attention, and a head map.

No information is in colour alone. Without colour (NO_COLOR, a file, a dumb terminal) the same is
written in figures. Letters: L layers, H query heads, T tokens, K demonstrations.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.text import Text

from abft_mlx.induction import Example, Heads

# Okabe and Ito's, as the figures have: from cold to hot, each with a letter colour of its own, so
# that they read on light and on dark terminals.
SHADES = (
    (0.02, "#000000 on #56B4E9"),
    (0.05, "#FFFFFF on #0072B2"),
    (0.15, "#000000 on #E69F00"),
    (0.40, "#000000 on #D55E00"),
)
RIGHT_COLOUR, WRONG_COLOUR = "#0072B2", "#D55E00"
# Attention from here on is written behind a token, too, so that colour is not alone.
WRITTEN = 0.05
# Where each block letter of the map begins; the same for right and for wrong labels.
STEPS, RIGHT, WRONG = (0.05, 0.1, 0.2, 0.4), "·░▒▓█", "·-=≡#"
_PROMPT_LINES, _MOST_CELLS = 5, 600
# A demonstration, or the query, is never cut to less.
_SHORTEST_PART_CELLS, _LONGEST_TOKEN_CELLS = 14, 24
# Of a part that is too long, what its end gets: that is where its label is.
_END_SHARE = 0.6
_MOST_ROWS, _GAP, _LABEL_CELLS = 16, 3, len("layer ")
_RIGHT, _WRONG, _ARROW = "✓", "✗", "→"


class Picture:
    """Draws the heads of a model, as wide as the terminal is.

    Args:
        heads: with one state or more; of several, the first and the last are compared.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._names = list(heads.states)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Lines for a console, two columns from its edge."""
        plain = console.color_system is None or console.no_color
        indent = "  " if options.max_width > 30 else ""
        width = max(options.max_width - len(indent), 1)
        for line in self._lines(width, plain):
            for part in line.wrap(console, width) if line else [line]:
                part.rstrip()
                yield Text(indent if part else "").append_text(part)

    def _lines(self, width: int, plain: bool) -> Iterator[Text]:
        """The headline, the prompt and the map."""
        place = choose(self._heads)
        if place is None:
            return
        example = typical(self._heads, *place)
        yield self._headline(*place, example)
        if example is not None:
            limit = max(min(_PROMPT_LINES * width, _MOST_CELLS), 1)
            shown = pieces(example, self._names, *place, limit)
            yield from self._prompt(shown, plain)
        cut = fit(self._heads, width)
        if cut is not None:
            yield Text()
            yield from self._map(cut, width, plain)

    def _headline(self, layer: int, head: int, example: Example | None) -> Text:
        """Which head is shown, and why."""
        means = [state.correctness[layer, head] for state in self._heads.states.values()]
        why = "the head that changed most" if len(means) > 1 else "the strongest head"
        line = (
            f"layer {layer} head {head}, {why}: attention on right labels minus wrong ones "
            f"{f' {_ARROW} '.join(f'{mean:+.0%}' for mean in means)} on average"
        )
        if example is not None:
            gold = clean(self._heads.labels[example.gold])
            line += f"; at the end of this prompt, whose answer is {gold}, it looks at:"
        return Text(line, overflow="fold")

    def _prompt(self, shown: Sequence[Piece], plain: bool) -> Iterator[Text]:
        """The prompt with figures in brackets, shaded by the attention of the last state."""
        text = Text(overflow="fold")
        for piece in shown:
            word = piece.text.lstrip(" ")
            text.append(" " * (len(piece.text) - len(word)))
            text.append(word, style="" if plain else shade(piece.weights[-1]))
            if piece.right is not None or max(piece.weights) >= WRITTEN:
                weights = _ARROW.join(f"{weight:.0%}" for weight in piece.weights)
                text.append(f"[{piece.mark}{weights}]")
        yield text
        states = f" {f' {_ARROW} '.join(self._names)}" if len(self._names) > 1 else ""
        yield Text(
            f"in brackets: attention{states}, of every label ({_RIGHT} the answer, {_WRONG} "
            f"another) and wherever it reaches {WRITTEN:.0%}",
            overflow="fold",
        )
        if not plain:
            legend = Text(f"shaded: attention {self._names[-1]} from ")
            for least, style in SHADES:
                legend.append(f" {least:.0%} ", style=style).append(" ")
            yield legend

    def _map(self, cut: HeadMap, width: int, plain: bool) -> Iterator[Text]:
        """The map of all heads, a row for each layer, the states side by side."""
        columns = next(iter(cut.cells.values())).shape[1]
        each = cut.heads_per_cell
        what = "a head" if each == 1 else f"the one farthest from 0 of {each} heads"
        yield Text(
            f"every head's attention on right labels minus wrong ones, mean of "
            f"{self._heads.prompts:,} prompts; a row is a layer, a column {what}",
            overflow="fold",
        )
        step = columns
        if len(self._names) > 1:
            most = (width - _LABEL_CELLS) // len(self._names) - _GAP
            step = max(columns, min(max(map(len, self._names)), most))  # a name may be wider
            named = (" " * _GAP).join(name[: max(step, 1)].ljust(step) for name in self._names)
            yield _row("layer " + named.rstrip())
        for row, layer in enumerate(cut.layers):
            text = _row(f"{layer:>{_LABEL_CELLS - 1}} ")
            for number, cells in enumerate(cut.cells.values()):
                text.append(" " * _GAP if number else "")
                for value in cells[row]:
                    text.append(glyph(value), style=_ink(value, plain))
                text.append(" " * (step - columns))
            text.rstrip()
            yield text
        legend = Text(overflow="fold")
        for sign, name in ((1, "more on right labels:"), (-1, "; on wrong ones:")):
            legend.append(name)
            for least in STEPS:
                legend.append(" ").append(glyph(sign * least), style=_ink(sign * least, plain))
                legend.append(f"{least:.0%}")
        yield legend.append(f"; {glyph(0.0)} less")
        if cut.hidden_layers:
            yield Text(
                f"layers left out, with no induction head or less change: {cut.hidden_layers}",
                overflow="fold",
            )


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

    @property
    def mark(self) -> str:
        """What is written before a label's figure."""
        return "" if self.right is None else _RIGHT if self.right else _WRONG


def choose(heads: Heads) -> tuple[int, int] | None:
    """Layer and number of the induction head whose correctness changed most.

    Of one state it is the strongest head; without induction heads every head counts. None where
    no layer has heads.
    """
    states = list(heads.states.values())
    first, last = states[0], states[-1]
    score = abs(last.correctness - first.correctness) if len(states) > 1 else first.magnitude
    inducing = np.maximum(np.nan_to_num(first.share), np.nan_to_num(last.share)) > 0
    if np.isfinite(score[inducing]).any():
        score = np.where(inducing, score, np.nan)
    if not np.isfinite(score).any():
        return None
    layer, head = np.unravel_index(np.nanargmax(score), score.shape)
    return int(layer), int(head)


def typical(heads: Heads, layer: int, head: int) -> Example | None:
    """The example in which the head does most nearly what it does on average."""
    means = [state.correctness[layer, head] for state in heads.states.values()]

    def away(example: Example) -> float:
        signs = np.where(np.asarray(example.demonstration_labels) == example.gold, 1.0, -1.0)
        rows = [example.rows[name][layer, head] for name in heads.states]
        masses = [float((row[example.label_positions] * signs).sum()) for row in rows]
        return sum(abs(mass - mean) for mass, mean in zip(masses, means, strict=True))

    return min(heads.examples, key=away, default=None)


def pieces(
    example: Example, states: Sequence[str], layer: int, head: int, limit_cells: int
) -> list[Piece]:
    """The prompt in pieces whose texts take about ``limit_cells`` cells at most.

    The middle of long demonstrations is left out, then whole demonstrations in the middle; labels
    that are shown are shown whole. All pieces together have the weights that the row has.

    Args:
        example: the prompt.
        states: names of the rows.
        layer: of the head.
        head: its number.
        limit_cells: terminal columns times lines.
    """
    rows = np.stack([np.asarray(example.rows[name])[layer, head] for name in states])
    classes = (int(label) == example.gold for label in example.demonstration_labels)
    labels = dict(zip(map(int, example.label_positions), classes, strict=True))
    parts: list[list[Piece]] = [[]]
    for piece in _tokens(example.tokens, rows, labels):
        parts[-1].append(piece)
        if piece.right is not None:
            parts.append([])
    parts = [part for part in parts if part]
    most = max(2, limit_cells // _SHORTEST_PART_CELLS)
    if len(parts) > most:
        before, after = most // 2, len(parts) - (most - most // 2)
        hidden = [piece for part in parts[before:after] for piece in part]
        parts = [*parts[:before], [_together(hidden)], *parts[after:]]
    if sum(cell_len(piece.text) for part in parts for piece in part) > limit_cells:
        each = max(limit_cells // len(parts), _SHORTEST_PART_CELLS)
        parts = [_cut(part, each) for part in parts]
    return [piece for part in parts for piece in part]


def clean(text: str) -> str:
    """A text without anything that a terminal obeys: controls, escapes, changes of direction."""
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if character in "\n\t":
            kept.append("⏎ " if character == "\n" else " ")
        elif category in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp"):
            kept.append("·")
        elif category != "Cf":
            kept.append(character)
    cleaned = "".join(kept)
    return cleaned if cell_len(cleaned) or not text else "·"


def _tokens(texts: Sequence[str], rows: np.ndarray, labels: Mapping[int, bool]) -> list[Piece]:
    """A piece for each token; one without text, half a character, counts with the next."""
    pieces, carried = [], np.zeros(len(rows))
    for place, text in enumerate(texts):
        weights = carried + rows[:, place]
        if not text and place + 1 < len(texts) and place not in labels:
            if place:
                carried = weights
                continue
            text = "⟨start⟩"
        carried = np.zeros(len(rows))
        shown = clean(text)
        if cell_len(shown) > _LONGEST_TOKEN_CELLS:
            shown = set_cell_size(shown, _LONGEST_TOKEN_CELLS - 1) + "…"
        pieces.append(Piece(shown, labels.get(place), tuple(map(float, weights))))
    return pieces


def _together(pieces: Sequence[Piece]) -> Piece:
    """An ellipsis that stands for some pieces."""
    return Piece(" …", None, tuple(map(float, np.sum([piece.weights for piece in pieces], axis=0))))


def _cut(part: list[Piece], width: int) -> list[Piece]:
    """A part without its middle, if it is wider than it may be; its last token stays."""
    sizes = [cell_len(piece.text) for piece in part]
    if sum(sizes) <= width:
        return part
    end, used = len(part) - 1, sizes[-1]
    while end > 0 and used + sizes[end - 1] <= width * _END_SHARE:
        end -= 1
        used += sizes[end]
    begin, spare = 0, width - used - 3
    while begin < end and sizes[begin] <= spare:
        spare -= sizes[begin]
        begin += 1
    return part if begin == end else [*part[:begin], _together(part[begin:end]), *part[end:]]


@dataclass(frozen=True)
class HeadMap:
    """A map of each state, cut to what can be shown.

    Attributes:
        layers: the layers that are shown, in order.
        cells: for each state's name (rows, columns) values; NaN where there is no head.
        heads_per_cell: heads that share a column; the value is that farthest from 0.
        hidden_layers: how many layers with heads are not shown.
    """

    layers: tuple[int, ...]
    cells: Mapping[str, np.ndarray]
    heads_per_cell: int
    hidden_layers: int


def fit(heads: Heads, width: int) -> HeadMap | None:
    """The correctness of all heads, cut to a width and to 16 layers.

    Where there are more layers, those are shown in which some head passes the filter, and of these
    the ones that change most; of one state, those with the largest values.

    Returns:
        None where there is no head at all.
    """
    states = list(heads.states.values())
    tables = [state.correctness for state in states]
    present = np.isfinite(tables[0]).any(axis=1)
    layers = np.flatnonzero(present)
    if not len(layers):
        return None
    kept = layers
    if len(kept) > _MOST_ROWS:
        share = np.max([np.nan_to_num(state.share).max(axis=1) for state in states], axis=0)
        inducing = np.flatnonzero((share > 0) & present)
        kept = inducing if len(inducing) else kept
        moved = tables[-1] - tables[0] if len(tables) > 1 else tables[0]
        order = np.argsort(-np.nan_to_num(abs(moved)).max(axis=1)[kept], kind="stable")
        kept = np.sort(kept[order[:_MOST_ROWS]])
    room = width - _LABEL_CELLS - _GAP * (len(tables) - 1)
    each = -(-tables[0].shape[1] // max(1, room // len(tables)))
    cells = {name: _merged(state.correctness[kept], each) for name, state in heads.states.items()}
    return HeadMap(tuple(map(int, kept)), cells, each, len(layers) - len(kept))


def _merged(table: np.ndarray, each: int) -> np.ndarray:
    """(rows, H) to (rows, columns): of every few heads the value farthest from 0."""
    rows, heads = table.shape
    padded = np.full((rows, -(-heads // each) * each), np.nan)
    padded[:, :heads] = table
    groups = padded.reshape(rows, -1, each)
    size = np.where(np.isfinite(groups), abs(groups), -1.0)
    return np.take_along_axis(groups, size.argmax(axis=-1)[..., None], axis=-1)[..., 0]


def shade(weight: float) -> str:
    """The style of a token that gets so much attention; nothing below the first step."""
    return next((style for least, style in reversed(SHADES) if weight >= least), "")


def glyph(value: float) -> str:
    """The block letter of a value."""
    if not np.isfinite(value):
        return " "
    return (RIGHT if value > 0 else WRONG)[np.searchsorted(STEPS, abs(value), side="right")]


def _ink(value: float, plain: bool) -> str:
    """The colour of a block letter."""
    if plain or not np.isfinite(value) or abs(value) < STEPS[0]:
        return ""
    return RIGHT_COLOUR if value > 0 else WRONG_COLOUR


def _row(text: str) -> Text:
    """A line that is cut, not wrapped."""
    return Text(text, no_wrap=True, overflow="crop")
