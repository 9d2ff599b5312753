"""What a model's heads look at, drawn in a terminal: a prompt shaded by attention, and a head map.

No information is in colour alone. Without colour (NO_COLOR, a file, a dumb terminal) the same is
written in figures. Letters: L layers, H query heads, T tokens.
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
# Cells of a prompt, of one of its demonstrations, and of a token.
MOST_CELLS, PART_CELLS, TOKEN_CELLS = 400, 14, 24
MOST_ROWS, GAP, LABEL_CELLS = 16, 3, len("layer ")


class Picture:
    """Draws the heads of a model, as wide as the terminal is; compares the first and last state."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._names = list(heads.states)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Lines for a console, two columns from its edge."""
        plain = console.color_system is None or console.no_color
        indent = "  " if options.max_width > 30 else ""
        width = max(options.max_width - len(indent), 1)
        place = choose(self._heads)
        for line in [] if place is None else self._lines(place, width, plain):
            for part in line.wrap(console, width) if line else [line]:
                part.rstrip()
                yield Text(indent if part else "").append_text(part)

    def _lines(self, place: tuple[int, int], width: int, plain: bool) -> Iterator[Text]:
        """The headline, the prompt and the map."""
        means = [state.correctness[place] for state in self._heads.states.values()]
        why = "the head that changed most" if len(means) > 1 else "the strongest head"
        headline = (
            f"layer {place[0]} head {place[1]}, {why}: attention on right labels minus wrong ones "
            f"{' → '.join(f'{mean:+.0%}' for mean in means)} on average"
        )
        example = next(iter(self._heads.examples), None)
        if example is not None:
            gold = clean(self._heads.labels[example.gold])
            headline += f"; at the end of this prompt, whose answer is {gold}, it looks at:"
        yield Text(headline, overflow="fold")
        if example is not None:
            yield from self._prompt(pieces(example, self._names, place, MOST_CELLS), plain)
        yield Text()
        yield from self._map(width, plain)

    def _prompt(self, shown: Sequence[Piece], plain: bool) -> Iterator[Text]:
        """The prompt with figures in brackets, shaded by the attention of the last state."""
        text = Text(overflow="fold")
        for piece in shown:
            shade = [style for least, style in SHADES if piece.weights[-1] >= least]
            word = piece.text.lstrip(" ")
            text.append(" " * (len(piece.text) - len(word)))
            text.append(word, style=shade[-1] if shade and not plain else "")
            if piece.mark or max(piece.weights) >= WRITTEN:
                text.append(f"[{piece.mark}{'→'.join(f'{one:.0%}' for one in piece.weights)}]")
        yield text
        states = f" {' → '.join(self._names)}" if len(self._names) > 1 else ""
        yield Text(
            f"in brackets: attention{states}, of every label (✓ the answer, ✗ another) and "
            f"wherever it reaches {WRITTEN:.0%}",
            overflow="fold",
        )
        if not plain:
            legend = Text(f"shaded: attention {self._names[-1]} from ")
            for least, style in SHADES:
                legend.append(f" {least:.0%} ", style=style).append(" ")
            yield legend

    def _map(self, width: int, plain: bool) -> Iterator[Text]:
        """The map of all heads, a row for each layer, the states side by side."""
        layers, cells, each, hidden = fit(self._heads, width)
        columns = cells[self._names[0]].shape[1]
        what = "a head" if each == 1 else f"the one farthest from 0 of {each} heads"
        yield Text(
            f"every head's attention on right labels minus wrong ones, mean of "
            f"{self._heads.prompts:,} prompts; a row is a layer, a column {what}",
            overflow="fold",
        )
        step = columns
        if len(self._names) > 1:
            most = (width - LABEL_CELLS) // len(self._names) - GAP
            step = max(columns, min(max(map(len, self._names)), most))  # a name may be wider
            names = (" " * GAP).join(name[: max(step, 1)].ljust(step) for name in self._names)
            yield Text(f"layer {names}".rstrip(), no_wrap=True, overflow="crop")
        for row, layer in enumerate(layers):
            line = Text(f"{layer:>{LABEL_CELLS - 1}} ", no_wrap=True, overflow="crop")
            for number, name in enumerate(self._names):
                line.append(" " * GAP if number else "")
                for value in cells[name][row]:
                    line.append(*glyph(value, plain))
                line.append(" " * (step - columns))
            line.rstrip()
            yield line
        legend = Text(overflow="fold")
        for sign, title in ((1, "more on right labels:"), (-1, "; on wrong ones:")):
            legend.append(title)
            for least in STEPS:
                legend.append(" ").append(*glyph(sign * least, plain)).append(f"{least:.0%}")
        yield legend.append(f"; {glyph(0.0, plain)[0]} less")
        if hidden:
            yield Text(f"layers left out, with less change: {hidden}", overflow="fold")


@dataclass(frozen=True)
class Piece:
    """A token, or an ellipsis for several with the sum of their attention in each state.

    ``mark`` is ✓ for a label token that is the query's gold label, ✗ for another label.
    """

    text: str
    mark: str
    weights: tuple[float, ...]


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


def pieces(
    example: Example, states: Sequence[str], place: tuple[int, int], limit_cells: int
) -> list[Piece]:
    """The prompt in pieces whose texts take about ``limit_cells`` terminal cells at most.

    The beginning of long demonstrations is left out, then whole demonstrations in the middle;
    labels that are shown are shown whole. All pieces together have the weights of the row.
    """
    rows = np.stack([example.rows[name][place] for name in states])
    right = dict(zip(example.label_positions.tolist(), example.right.tolist(), strict=True))
    parts: list[list[Piece]] = [[]]
    carried = np.zeros(len(rows))
    for n, token in enumerate(example.tokens):
        carried = carried + rows[:, n]
        if not token and n + 1 < len(example.tokens) and n not in right and n:
            continue  # half a character, which counts with the next token
        text = clean(token) if token or n else "⟨start⟩"
        if cell_len(text) > TOKEN_CELLS:
            text = set_cell_size(text, TOKEN_CELLS - 1) + "…"
        mark = ("✓" if right[n] else "✗") if n in right else ""
        parts[-1].append(Piece(text, mark, tuple(map(float, carried))))
        carried = np.zeros(len(rows))
        if mark:
            parts.append([])
    parts = [part for part in parts if part]
    most = max(2, limit_cells // PART_CELLS)
    if len(parts) > most:
        before, after = most // 2, len(parts) - (most - most // 2)
        parts[before:after] = [[_ellipsis([one for part in parts[before:after] for one in part])]]
    if sum(cell_len(piece.text) for part in parts for piece in part) > limit_cells:
        parts = [_cut(part, max(limit_cells // len(parts), PART_CELLS)) for part in parts]
    return [piece for part in parts for piece in part]


def _ellipsis(hidden: Sequence[Piece]) -> Piece:
    """An ellipsis that stands for some pieces."""
    return Piece(" …", "", tuple(map(float, np.sum([piece.weights for piece in hidden], axis=0))))


def _cut(part: list[Piece], width: int) -> list[Piece]:
    """The end of a part, which is where its label is."""
    sizes = np.cumsum([cell_len(piece.text) for piece in reversed(part)])
    kept = max(1, int(np.searchsorted(sizes, width, side="right")))
    return part if kept >= len(part) else [_ellipsis(part[:-kept]), *part[-kept:]]


def clean(text: str) -> str:
    """A text without anything that a terminal obeys: controls, escapes, changes of direction."""
    shown = []
    for character in text:
        category = unicodedata.category(character)
        if character in "\n\t":
            shown.append("⏎ " if character == "\n" else " ")
        elif category in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append("·")
        elif category != "Cf":
            shown.append(character)
    cleaned = "".join(shown)
    return cleaned if cell_len(cleaned) or not text else "·"


def fit(heads: Heads, width: int) -> tuple[list[int], Mapping[str, np.ndarray], int, int]:
    """The correctness of all heads, cut to a width and to the 16 layers that change most.

    Returns:
        The layers that are shown; for each state's name (rows, columns) values, NaN where there is
        no head; heads that share a column, whose value is that farthest from 0; and how many
        layers with heads are not shown.
    """
    tables = {name: state.correctness for name, state in heads.states.items()}
    first, *_, last = [*tables.values()] * 2
    layers = np.flatnonzero(np.isfinite(first).any(axis=1))
    moved = last - first if len(tables) > 1 else first
    order = np.argsort(-np.nan_to_num(abs(moved)).max(axis=1)[layers], kind="stable")
    shown = np.sort(layers[order[:MOST_ROWS]])
    room = width - LABEL_CELLS - GAP * (len(tables) - 1)
    each = -(-first.shape[1] // max(1, room // len(tables)))
    cells = {name: _merged(table[shown], each) for name, table in tables.items()}
    return shown.tolist(), cells, each, len(layers) - len(shown)


def _merged(table: np.ndarray, each: int) -> np.ndarray:
    """(rows, H) to (rows, columns): of every few heads the value farthest from 0."""
    rows, heads = table.shape
    padded = np.full((rows, -(-heads // each) * each), np.nan)
    padded[:, :heads] = table
    groups = padded.reshape(rows, -1, each)
    size = np.where(np.isfinite(groups), abs(groups), -1.0)
    return np.take_along_axis(groups, size.argmax(axis=-1)[..., None], axis=-1)[..., 0]


def glyph(value: float, plain: bool = True) -> tuple[str, str]:
    """The block letter of a value, and its colour."""
    if not np.isfinite(value):
        return " ", ""
    step = int(np.searchsorted(STEPS, abs(value), side="right"))
    colour = RIGHT_COLOUR if value > 0 else WRONG_COLOUR
    return (RIGHT if value > 0 else WRONG)[step], colour if step and not plain else ""
