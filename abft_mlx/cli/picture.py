"""What a model's heads look at, drawn in a terminal: a prompt shaded by attention, and a head map.

Nothing is told by colour alone. Where there is none (NO_COLOR, a file, a dumb terminal) the same
is written in figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.style import Style
from rich.text import Text

from abft_mlx.cli import picture_map, picture_prompt
from abft_mlx.cli.picture_map import STEPS, HeadMap, glyph
from abft_mlx.cli.picture_prompt import Chosen, Piece
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
_PROMPT_LINES = 5
_MOST_CELLS = 600
_INDENT = 2
_NARROW_COLUMNS = 30


class Picture:
    """Draws what was seen of a model's heads, as wide as the terminal is."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Lines for a console."""
        plain = console.color_system is None or console.no_color
        indent = " " * (_INDENT if options.max_width > _NARROW_COLUMNS else 0)
        width = max(options.max_width - len(indent), 1)
        for line in _Drawing(self._heads, width, plain, options.ascii_only).lines():
            if options.ascii_only:
                line = _encodable(line, options.encoding)
            for one in line.wrap(console, width) if line else [line]:
                one.rstrip()
                yield Text(indent if one else "").append_text(one)


def shade(weight: float) -> str:
    """The style of a token that gets so much attention; nothing below the first step."""
    found = ""
    for least, style in SHADES:
        if weight >= least:
            found = style
    return found


def percent(value: float) -> str:
    """A share of attention as a person reads it."""
    return f"{value:.0%}"


class _Drawing:
    def __init__(self, heads: Heads, width: int, plain: bool, ascii_only: bool) -> None:
        self.heads = heads
        self.names = list(heads.states)
        self.width = width
        self.plain = plain
        self.ascii_only = ascii_only
        self.right, self.wrong, self.arrow = "✓", "✗", "→"
        if ascii_only:
            self.right, self.wrong, self.arrow = "right ", "wrong ", "->"

    def lines(self) -> Iterator[Text]:
        chosen = picture_prompt.choose(self.heads)
        if chosen is None:
            return
        example = picture_prompt.typical(self.heads, chosen)
        yield self._headline(chosen, example)
        if example is not None:
            limit = min(_PROMPT_LINES * self.width, _MOST_CELLS)
            shown = picture_prompt.pieces(
                example, self.names, chosen.layer, chosen.head, max(limit, 1)
            )
            yield from (self._written(shown) if self.plain else self._coloured(shown))
        states = self.heads.states
        cut = picture_map.fit(
            {name: state.correctness for name, state in states.items()},
            {name: state.share for name, state in states.items()},
            self.width,
        )
        if cut is not None:
            yield Text()
            yield from self._map(cut)

    def _headline(self, chosen: Chosen, example: Example | None) -> Text:
        changes = [f"{one:+.0%}" for one in chosen.correctness]
        moved = len(self.names) > 1
        why = "the head that changed most" if moved else "the strongest head"
        line = (
            f"layer {chosen.layer} head {chosen.head}, {why}: attention on right labels minus "
            f"wrong ones {f' {self.arrow} '.join(changes)} on average"
        )
        if example is not None:
            gold = picture_prompt.clean(self.heads.labels[example.gold])
            line += f"; at the end of this prompt, whose answer is {gold}, it looks at"
        return Text(line + ("" if example is None else ":"), overflow="fold")

    def _coloured(self, shown: Sequence[Piece]) -> Iterator[Text]:
        for state, name in enumerate(self.names):
            if len(self.names) > 1:
                yield Text(name, style="bold")
            text = Text(overflow="fold")
            for piece in shown:
                weight = piece.weights[state]
                ink = Style.parse(shade(weight))
                word = piece.text.lstrip(" ")
                text.append(" " * (len(piece.text) - len(word)))
                text.append(word, style=ink)
                if piece.right is not None or weight >= WRITTEN:
                    text.append(f"{self._mark(piece)}{percent(weight)}", ink + Style(bold=True))
            yield text
        legend = Text("attention from ")
        for least, style in SHADES:
            legend.append(f" {percent(least)} ", style=style)
            legend.append(" ")
        legend.append(f" label: {self._marks()}")
        yield legend

    def _written(self, shown: Sequence[Piece]) -> Iterator[Text]:
        text = Text(overflow="fold")
        for piece in shown:
            text.append(piece.text)
            if piece.right is None and max(piece.weights) < WRITTEN:
                continue
            weights = self.arrow.join(percent(one) for one in piece.weights)
            text.append(f"[{self._mark(piece)}{weights}]")
        yield text
        states = f" {self.arrow} ".join(self.names)
        of = f"attention {states}" if len(self.names) > 1 else "attention"
        yield Text(
            f"in brackets: {of}, of every label ({self._marks()}) and "
            f"wherever it reaches {percent(WRITTEN)}",
            overflow="fold",
        )

    def _mark(self, piece: Piece) -> str:
        if piece.right is None:
            return ""
        return self.right if piece.right else self.wrong

    def _marks(self) -> str:
        if self.ascii_only:
            return "right: the answer, wrong: another"
        return f"{self.right} the answer, {self.wrong} another"

    def _map(self, cut: HeadMap) -> Iterator[Text]:
        title = (
            f"every head's attention on right labels minus wrong ones, mean of "
            f"{self.heads.prompts:,} prompts; a row is a layer, a column "
        )
        title += (
            "a head"
            if cut.heads_per_cell == 1
            else f"the one farthest from 0 of {cut.heads_per_cell} heads"
        )
        yield Text(title, overflow="fold")
        label = picture_map.label_width(cut.layers)
        columns = next(iter(cut.cells.values())).shape[1]
        # A name may be wider than its map.
        step = columns
        if len(self.names) > 1:
            longest = max(map(len, self.names))
            step = max(columns, min(longest, (self.width - label) // len(self.names) - 3))
            heading = "layer".ljust(label)
            heading += "   ".join(name[: max(step, 1)].ljust(step) for name in self.names)
            yield _row(heading.rstrip())
        for row, layer in enumerate(cut.layers):
            text = _row(str(layer).rjust(label - 1) + " ")
            for number, cells in enumerate(cut.cells.values()):
                text.append("   " if number else "")
                for value in cells[row]:
                    text.append(glyph(value, ascii_only=self.ascii_only), style=self._ink(value))
                text.append(" " * (step - columns))
            text.rstrip()
            yield text
        yield self._legend()
        if cut.left_out:
            many = "layers" if cut.left_out > 1 else "layer"
            yield Text(
                f"left out: {cut.left_out} {many} with no induction head or with less change",
                overflow="fold",
            )

    def _legend(self) -> Text:
        legend = Text(overflow="fold")
        for sign, name in ((1, "more on right labels:"), (-1, "; on wrong ones:")):
            legend.append(name)
            for least in STEPS:
                legend.append(" ")
                mark = glyph(sign * least, ascii_only=self.ascii_only)
                legend.append(mark, style=self._ink(sign * least))
                legend.append(f"{percent(least)}")
        legend.append(f"; {glyph(0.0, ascii_only=self.ascii_only)} less")
        return legend

    def _ink(self, value: float) -> str:
        if self.plain or not np.isfinite(value) or abs(value) < STEPS[0]:
            return ""
        return RIGHT_COLOUR if value > 0 else WRONG_COLOUR


def _row(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="crop")


def _encodable(line: Text, encoding: str) -> Text:
    """A line of which every character can be written in the terminal's encoding."""
    swapped = line.plain.replace("⏎ ", "\\n").replace("…", "...").replace("⟨start⟩", "<start>")
    safe = swapped.encode(encoding, "replace").decode(encoding)
    made = Text(safe, no_wrap=line.no_wrap, overflow=line.overflow)
    if len(safe) == len(line.plain):
        made.spans = line.spans
    return made
