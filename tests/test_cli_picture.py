"""The terminal's picture: the numbers behind it, and what a console makes of hostile prompts."""

from __future__ import annotations

import io
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_support import made_heads, made_prompt
from rich.cells import cell_len
from rich.console import Console

from abft_mlx.cli import picture
from abft_mlx.cli.picture import Picture
from abft_mlx.induction import Heads

SGR = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = (
    "[bold]big[/bold]", "\x1b[2J", "\x1b]0;title\x07", "\r", "\n", "\t", "\x9b31m", "\u202e",
    "[/]", "", "<script>", "é", "你好", "😀", "a" * 300, "\\[red]", "\x00", "\ud800", "\u2028",
)  # fmt: skip


def printed(heads: Heads, width: int = 80, *, colour: bool = False, **more: object) -> str:
    stream = io.StringIO()
    system = "truecolor" if colour else None
    options = {"force_terminal": colour, "color_system": system, "width": width, "_environ": {}}
    Console(file=stream, **(options | more)).print(Picture(heads))
    return stream.getvalue()


def changed_most(heads: Heads) -> tuple[int, int]:
    """By loops: of heads that pass the filter anywhere, the one whose correctness moved most."""
    before, after = heads.states["before"], heads.states["after"]
    best, found = -1.0, (-1, -1)
    for layer in range(before.share.shape[0]):
        for head in range(before.share.shape[1]):
            if not max(before.share[layer, head], after.share[layer, head]) > 0:
                continue
            moved = abs(after.correctness[layer, head] - before.correctness[layer, head])
            if moved > best:
                best, found = moved, (layer, head)
    return found


@pytest.mark.parametrize("none_in", [(), (0, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_the_head_is_the_induction_head_that_changed_most(
    seed: int, none_in: tuple[int, ...]
) -> None:
    heads = made_heads(5, 4, seed=seed, none_in=none_in)
    chosen = picture.choose(heads)
    assert chosen is not None
    assert chosen == changed_most(heads)


def test_of_one_state_it_is_the_strongest_head() -> None:
    heads = made_heads(states=("before",))
    chosen = picture.choose(heads)
    magnitude = heads.states["before"].magnitude
    assert chosen is not None
    assert magnitude[chosen] == magnitude.max()
    shown = printed(heads)
    assert "the strongest head" in shown
    assert "→" not in shown


def test_without_induction_heads_every_head_counts() -> None:
    heads = made_heads()
    states = {
        name: replace(one, share=np.zeros_like(one.share)) for name, one in heads.states.items()
    }
    chosen = picture.choose(replace(heads, states=states))
    moved = abs(heads.states["after"].correctness - heads.states["before"].correctness)
    assert chosen is not None
    assert moved[chosen] == moved.max()


def test_pieces_are_the_tokens_with_their_weights() -> None:
    heads = made_heads()
    example = heads.examples[1]
    shown = picture.pieces(example, ("before", "after"), 1, 2, 10_000)
    assert [one.text.replace("⏎ ", "\n") for one in shown] == list(example.tokens)
    for place, piece in enumerate(shown):
        assert piece.weights == tuple(
            float(example.rows[name][1, 2, place]) for name in ("before", "after")
        )
    marked = {place: one.right for place, one in enumerate(shown) if one.right is not None}
    assert marked == {
        int(place): int(label) == example.gold
        for place, label in zip(example.label_positions, example.demonstration_labels, strict=True)
    }


@pytest.mark.parametrize("limit", [1, 40, 100, 200, 400])
@pytest.mark.parametrize("demonstrations", [1, 4, 40])
def test_a_cut_prompt_keeps_ends_labels_and_all_attention(limit: int, demonstrations: int) -> None:
    tokens, places = made_prompt(demonstrations, 30)
    heads = made_heads(tokens=tokens, label_positions=places)
    example = heads.examples[0]
    shown = picture.pieces(example, ("before", "after"), 0, 0, limit)
    assert sum(cell_len(one.text) for one in shown) <= max(limit, 40) * 1.2
    for state, name in enumerate(("before", "after")):
        row = example.rows[name][0, 0]
        assert sum(one.weights[state] for one in shown) == pytest.approx(row.sum(), abs=1e-5)
    labels = [one for one in shown if one.right is not None]
    if demonstrations == 4 and limit >= 100:
        assert [one.text for one in labels] == [tokens[place] for place in places]
        assert [one.weights[0] for one in labels] == [
            float(example.rows["before"][0, 0, place]) for place in places
        ]
    assert shown[-1].text == ":"
    assert shown[0].text == "text" or limit < 40
    assert any("…" in one.text for one in shown)


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    cleaned = picture.clean(text)
    kinds = {unicodedata.category(one) for one in cleaned}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert bool(cleaned) == bool(text)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", [12, 40, 80, 200])
def test_hostile_tokens_are_shown_and_not_obeyed(width: int, colour: bool) -> None:
    tokens = [*HOSTILE, " ham", *HOSTILE, " spam", *HOSTILE]
    places = [len(HOSTILE), 2 * len(HOSTILE) + 1]
    names = ("ham\x1b[31m", "[blink]spam", "eggs")
    shown = printed(
        made_heads(tokens=tokens, label_positions=places, labels=names), width, colour=colour
    )
    bare = SGR.sub("", shown) if colour else shown
    kinds = {unicodedata.category(one) for one in bare.replace("\n", "")}
    assert not kinds & {"Cc", "Cf", "Cs"}
    assert max(cell_len(line) for line in bare.splitlines()) <= width
    if width == 200:
        assert "[bold]big[/bold]" in bare
        assert "\\[red]" in bare
        assert "ham·[31m" in bare


def test_without_colour_every_label_has_its_figures() -> None:
    heads = made_heads(seed=2)
    chosen = picture.choose(heads)
    assert chosen is not None
    example = picture.typical(heads, *chosen)
    assert example is not None
    shown = printed(heads, 200)
    assert "\x1b" not in shown
    flat = " ".join(shown.split())
    before, after = (example.rows[name][chosen] for name in heads.states)
    for place, label in zip(example.label_positions, example.demonstration_labels, strict=True):
        mark = "✓" if label == example.gold else "✗"
        word = example.tokens[place].strip()
        assert f"{word}[{mark}{before[place]:.0%}→{after[place]:.0%}]" in flat
    others = [place for place in range(len(before)) if place not in example.label_positions]
    written = [p for p in others if max(before[p], after[p]) >= 0.05]
    assert written
    for place in written:
        assert f"[{before[place]:.0%}→{after[place]:.0%}]" in flat
    assert shown.count("%→") == len(written) + len(example.label_positions)


@pytest.mark.parametrize("value", [-1, -0.4, -0.39, -0.05, -0.049, 0, 0.049, 0.05, 0.2, 0.4, 1])
def test_a_cell_of_the_map_has_its_block(value: float) -> None:
    step = int(np.digitize(abs(value), [0.05, 0.1, 0.2, 0.4]))
    expected = "·" if step == 0 else ("░▒▓█" if value > 0 else "-=≡#")[step - 1]
    assert picture.glyph(value) == expected


def map_lines(shown: str) -> list[str]:
    lines = shown.splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip().startswith("layer before"))
    end = next(n for n, line in enumerate(lines) if line.strip().startswith("more on right"))
    return lines[start + 1 : end]


def test_the_map_is_the_correctness_of_every_head() -> None:
    heads = made_heads(6, 12, none_in=(2,), seed=1)
    rows = map_lines(printed(heads))
    assert [line.split()[0] for line in rows] == ["0", "1", "3", "4", "5"]
    for line in rows:
        layer = int(line.split()[0])
        cells = line[2 + len("layer ") :].ljust(27)
        for start, name in ((0, "before"), (15, "after")):
            values = heads.states[name].correctness[layer]
            assert cells[start : start + 12] == "".join(map(picture.glyph, values))


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize(("layers", "count"), [(32, 32), (80, 64), (3, 2), (1, 1)])
def test_large_maps_are_cut_to_fit(layers: int, count: int, width: int) -> None:
    heads = made_heads(layers, count, none_in=(0,) if layers > 1 else ())
    values = {name: one.correctness for name, one in heads.states.items()}
    cut = picture.fit(heads, width)
    assert cut is not None
    present = layers - (layers > 1)
    assert len(cut.layers) == min(16, present)
    assert len(cut.layers) + cut.hidden_layers == present
    each = cut.heads_per_cell
    for name, table in cut.cells.items():
        assert table.shape == (len(cut.layers), -(-count // each))
        for row, layer in enumerate(cut.layers):
            for column in range(table.shape[1]):
                group = values[name][layer, column * each : (column + 1) * each]
                assert table[row, column] == max(group, key=abs)
    columns = next(iter(cut.cells.values())).shape[1]
    assert 2 * columns + 3 + 6 <= width
    if each > 1:  # no finer map would have fitted
        assert 2 * -(-count // (each - 1)) + 3 + 6 > width
    for colour in (False, True):
        shown = SGR.sub("", printed(heads, width, colour=colour))
        assert max(cell_len(line) for line in shown.splitlines()) <= width
        assert ("layers left out" in shown) is (present > 16)


@pytest.mark.parametrize("colour", [False, True])
def test_parts_that_are_missing_are_left_out(colour: bool) -> None:
    only_map = printed(made_heads(examples=0), colour=colour)
    assert "it looks at" not in only_map
    assert "layer before" in SGR.sub("", only_map)
    assert printed(made_heads(2, 2, none_in=(0, 1)), colour=colour).strip() == ""
    assert printed(made_heads(2, 0), colour=colour).strip() == ""
