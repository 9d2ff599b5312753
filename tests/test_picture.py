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
from made_runs import HOSTILE, heads
from rich.cells import cell_len
from rich.console import Console

from abft_mlx.cli import picture
from abft_mlx.cli.picture import Picture
from abft_mlx.induction import Heads

SGR = re.compile(r"\x1b\[[0-9;]*m")
STATES = ("before", "after")


def printed(seen: Heads, width: int = 80, *, colour: bool = False) -> str:
    stream = io.StringIO()
    system = "truecolor" if colour else None
    console = Console(
        file=stream, force_terminal=colour, color_system=system, width=width, _environ={}
    )
    console.print(Picture(seen))
    return stream.getvalue()


def prompt(demonstrations: int = 4, words: int = 10) -> list[str]:
    part = ["text", ":", *(f" word{n}" for n in range(words)), "\n", "label", ":"]
    return [*part, " ham", "\n"] * demonstrations + part


@pytest.mark.parametrize("without", [(), (0, 2)])
def test_the_head_is_the_induction_head_that_changed_most(without: tuple[int, ...]) -> None:
    seen = heads(5, 4, seed=3, without=without)
    before, after = seen.states.values()
    best, place = -1.0, None
    for layer, head in np.ndindex(5, 4):
        moved = abs(after.correctness[layer, head] - before.correctness[layer, head])
        if max(before.share[layer, head], after.share[layer, head]) > 0 and moved > best:
            best, place = moved, (layer, head)
    assert picture.choose(seen) == place
    one = heads(states=("before",))
    assert (
        one.states["before"].magnitude[picture.choose(one)] == one.states["before"].magnitude.max()
    )
    assert "the strongest head" in printed(one)
    none = {name: replace(s, share=np.zeros_like(s.share)) for name, s in seen.states.items()}
    moved = abs(after.correctness - before.correctness)
    assert moved[picture.choose(replace(seen, states=none))] == np.nanmax(moved)


@pytest.mark.parametrize("limit", [1, 100, 200, 10_000])
@pytest.mark.parametrize("demonstrations", [1, 4, 40])
def test_a_cut_prompt_keeps_ends_labels_and_all_attention(limit: int, demonstrations: int) -> None:
    tokens = prompt(demonstrations)
    seen = heads(tokens=tokens)
    example = seen.examples[0]
    shown = picture.pieces(example, STATES, (0, 0), limit)
    assert sum(cell_len(piece.text) for piece in shown) <= max(limit, 60) * 1.2
    for number, name in enumerate(STATES):
        row = example.rows[name][0, 0]
        assert sum(one.weights[number] for one in shown) == pytest.approx(row.sum(), abs=1e-5)
    assert shown[-1].text == ":"
    if limit == 10_000:
        assert [one.text.replace("⏎ ", "\n") for one in shown] == list(example.tokens)
        marks = {n: piece.mark for n, piece in enumerate(shown) if piece.mark}
        assert marks == {
            int(place): "✓" if right else "✗"
            for place, right in zip(example.label_positions, example.right, strict=True)
        }
    elif sum(map(cell_len, tokens)) > limit:
        assert any("…" in one.text for one in shown)


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    cleaned = picture.clean(text)
    kinds = {unicodedata.category(one) for one in cleaned}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert bool(cleaned) == bool(text)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", [12, 80])
def test_hostile_tokens_are_shown_and_not_obeyed(width: int, colour: bool) -> None:
    names = ("ham\x1b[31m", "[blink]spam", "eggs")
    shown = printed(heads(tokens=HOSTILE, labels=names), width, colour=colour)
    bare = SGR.sub("", shown) if colour else shown
    kinds = {unicodedata.category(one) for one in bare.replace("\n", "")}
    assert not kinds & {"Cc", "Cf", "Cs"}
    assert max(cell_len(line) for line in bare.splitlines()) <= width
    assert ("\x1b" in shown) is colour
    if width == 80:
        assert "[bold]big[/bold]" in bare.replace("\n  ", "")


def test_without_colour_the_attention_is_written() -> None:
    seen = heads(tokens=prompt(words=4), seed=2)
    place = picture.choose(seen)
    example = seen.examples[0]
    flat = " ".join(printed(seen, 200).split())
    before, after = (example.rows[name][place] for name in STATES)
    for label, right in zip(example.label_positions, example.right, strict=True):
        weights = f"{before[label]:.0%}→{after[label]:.0%}"
        assert f"{example.tokens[label].strip()}[{'✓' if right else '✗'}{weights}]" in flat
    others = set(range(len(before))) - set(map(int, example.label_positions))
    written = [n for n in others if max(before[n], after[n]) >= 0.05]
    for n in written:
        assert f"[{before[n]:.0%}→{after[n]:.0%}]" in flat
    assert flat.count("%→") == len(written) + len(example.label_positions)


@pytest.mark.parametrize("value", [-1, -0.39, -0.05, -0.049, 0, 0.049, 0.05, 0.4])
def test_a_cell_of_the_map_has_its_block(value: float) -> None:
    step = int(np.digitize(abs(value), [0.05, 0.1, 0.2, 0.4]))
    expected = "·" if step == 0 else ("░▒▓█" if value > 0 else "-=≡#")[step - 1]
    assert picture.glyph(value)[0] == expected


def test_the_map_is_the_correctness_of_every_head() -> None:
    seen = heads(6, 12, without=(2,), seed=1)
    lines = printed(seen).splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip().startswith("layer before"))
    end = next(n for n, line in enumerate(lines) if line.strip().startswith("more on right"))
    rows = lines[start + 1 : end]
    assert [line.split()[0] for line in rows] == ["0", "1", "3", "4", "5"]
    for line in rows:
        cells = line[2 + len("layer ") :].ljust(27)
        for at, name in ((0, "before"), (15, "after")):
            values = seen.states[name].correctness[int(line.split()[0])]
            assert cells[at : at + 12] == "".join(picture.glyph(value)[0] for value in values)


@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize(("layers", "count"), [(80, 64), (3, 2), (1, 1)])
def test_large_maps_are_cut_to_fit(layers: int, count: int, width: int) -> None:
    seen = heads(layers, count, without=(0,) if layers > 1 else ())
    shown, cells, each, hidden = picture.fit(seen, width)
    present = layers - (layers > 1)
    assert len(shown) == min(16, present)
    assert len(shown) + hidden == present
    for name, table in cells.items():
        for row, layer in enumerate(shown):
            values = seen.states[name].correctness[layer]
            for column in range(table.shape[1]):
                group = values[column * each : (column + 1) * each]
                assert table[row, column] == max(group, key=abs)
    assert 2 * cells["before"].shape[1] + 3 + 6 <= width
    if each > 1:  # no finer map would have fitted
        assert 2 * -(-count // (each - 1)) + 3 + 6 > width
    lines = SGR.sub("", printed(seen, width, colour=True))
    assert max(cell_len(line) for line in lines.splitlines()) <= width
    assert ("layers left out" in lines) is (present > 16)


def test_parts_that_are_missing_are_left_out() -> None:
    only_map = printed(heads(examples=0))
    assert "it looks at" not in only_map
    assert "layer before" in only_map
    assert printed(heads(2, 2, without=(0, 1))).strip() == ""
    assert printed(heads(2, 0)).strip() == ""
