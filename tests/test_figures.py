"""Figures from arrays: what is drawn, how it is written, and the page that documents them."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_support import bars, curves, drawn, image, ticks
from made_runs import NAN, ODD, heads

from abft_mlx import analysis
from abft_mlx.analysis import figures, style
from abft_mlx.analysis.style import Plot, on_axes

RANDOM = np.random.default_rng(0)


def axes_of(function: Any, **arguments: Any) -> Any:
    """The Axes of a figure that has one."""
    (axes,) = drawn(on_axes(function, **arguments))
    return axes


def test_a_head_map_has_layers_upwards_and_heads_to_the_right() -> None:
    values = np.array([[0.25, 0.5], [NAN, NAN], [0.125, 0.875]])
    axes = axes_of(figures.head_map, values=values, label="magnitude (share)")
    np.testing.assert_array_equal(image(axes), values)
    assert axes.images[0].origin == "lower"
    assert axes.images[0].get_clim() == (0.125, 0.875)
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "0.25", (1, 0): "0.50", (0, 2): "0.12", (1, 2): "0.88",
    }  # fmt: skip
    assert axes.patch.get_hatch() is not None
    assert not axes_of(figures.head_map, values=RANDOM.random((32, 32)), label="x").texts
    states = {"a": np.array([[1e-4, 0.0]]), "b": np.array([[0.0, 0.0]])}
    panels = drawn(partial(figures.head_maps, states=states, label="m", least=0.02))
    limits = [panel.images[0].get_clim() for panel in panels]
    assert limits == [(0.0, 0.02), (0.0, 0.02), (-0.02, 0.02)]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_numbers_contrast_with_their_cell(value: float) -> None:
    axes = axes_of(figures.head_map, values=np.array([[value]]), label="x", limits=(0, 1))
    behind = axes.images[0].cmap(axes.images[0].norm(value))[:3]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in behind]
    letter = {"white": 1.0, "black": 0.0}[axes.texts[0].get_color()]
    pair = sorted((float(np.dot(linear, (0.2126, 0.7152, 0.0722))), letter))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


def test_of_two_labels_that_are_too_close_the_first_is_named() -> None:
    axes = axes_of(
        figures.attention_map, rows=np.full((4, 300), 1 / 300), names=list("abcd"),
        tokens=[f"t{n}" for n in range(300)], label_positions=np.array([40, 41, 150, 222]),
        right=np.ones(4, bool),
    )  # fmt: skip
    shown = dict(zip(map(int, axes.get_xticks()), ticks(axes.xaxis), strict=True))
    assert all(text == f"t{place}" for place, text in shown.items())
    assert {299, 0, 40, 150, 222} <= set(shown)
    assert 41 not in shown
    assert len(shown) < 80


def test_bars_of_methods() -> None:
    axes = axes_of(
        figures.bars, methods=["vanilla", "_abft"], values=np.array([[0.5, NAN], [0.75, 0.25]]),
        spread=np.array([[NAN, NAN], [0.125, 0]]), columns=["A", "B"], zero_shot=[0.5, NAN],
    )  # fmt: skip
    assert bars(axes)[" _abft"] == [75, 25]
    labels = {text.get_text() for text in axes.figure.legends[0].get_texts()}
    assert labels == {"vanilla", " _abft", "vanilla, zero-shot"}


def test_contours_of_a_plane_have_the_first_method_to_the_right() -> None:
    axes = axes_of(
        figures.plane, accuracy=np.array([[0.5, 0.6], [0.8, 0.7]]), factors=np.array([0.0, 1.0]),
        names=("abft", "end_to_end"),
    )  # fmt: skip
    assert curves(axes)["abft (80.0)"] == ([1], [0])
    assert curves(axes)["end_to_end (60.0)"] == ([0], [1])
    assert curves(axes)["best (80.0)"] == ([1], [0])
    levels = next(one for one in axes.collections if len(one.get_paths()) > 2).get_paths()
    inside = [n for n, path in enumerate(levels)
              if len(path.vertices) and path.contains_point((0.97, 0.02))]  # fmt: skip
    assert inside[-1] == len(levels) - 1


def test_bars_of_a_reliability_diagram_stay_in_their_bins() -> None:
    before = {"confidence": [NAN, 0.75], "accuracy": [NAN, 0.5], "count": [0, 8]}
    after = {"confidence": [0.25, 0.875], "accuracy": [0.125, 1.0], "count": [2, 6]}
    states = {name: {key: np.array(value) for key, value in bins.items()}
              for name, bins in (("before", before), ("after", after))}  # fmt: skip
    upper, lower = drawn(partial(figures.reliability, states=states))
    assert curves(upper)["before"] == ([75], [50])
    assert bars(lower) == {"before": [0, 8], "after": [2, 6]}
    for container in lower.containers:
        for n, bar in enumerate(container):
            assert 50 * n <= bar.get_x() < bar.get_x() + bar.get_width() <= 50 * (n + 1)


def test_series_look_different() -> None:
    for choices in (style.MARKERS, style.HATCHES, style.DASHES):
        assert len({(style.colour(n), style.cycled(choices, n)) for n in range(16)}) == 16


def test_many_classes_are_named_in_part() -> None:
    names = ["a class with a very long name", "_under", "$do$lar", "中文", *map(str, range(73))]
    counts = RANDOM.integers(0, 2000, (77, 77))
    draw = partial(figures.confusions, states={"a": counts, "b": counts}, names=names)
    first, _ = drawn(draw)
    assert not first.texts
    assert 10 < len(ticks(first.yaxis)) < 77


def test_formats_are_the_same_bytes_and_hold_text_as_text(tmp_path: Path) -> None:
    example = heads(1, 2, len(ODD)).examples[0]
    draw = on_axes(
        figures.attention_map, rows=example.rows["before"][0], tokens=example.tokens,
        label_positions=example.label_positions, right=example.right, names=["L0 H0", "L0 H1"],
    )  # fmt: skip
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        plot = Plot("model-0.5B", draw, "n = 1; 50% of $5")
        written.append(plot.write(tmp_path / name, style.FORMATS))
    ends = ("svg", "png", "pdf")
    assert [path.name for path in written[0]] == [f"model-0.5B.{end}" for end in ends]
    contents = [[path.read_bytes() for path in paths] for paths in written]
    assert contents[0] == contents[1]
    svg = written[0][0].read_text(encoding="utf-8")
    for text in ("&lt;script&gt;", "n = 1; 50% of $5", "attention (share)", "L0 H1", r"\n",
                 r"\u202eright", "中文"):  # fmt: skip
        assert f">{text}</text>" in svg, text
    assert "dc:date" not in svg
    assert b"CreationDate" not in contents[0][2]


def test_importing_draws_nothing() -> None:
    program = "import sys, abft_mlx.analysis; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_page_names_every_figure(checkout: Path) -> None:
    text = (checkout / "docs" / "heads.md").read_text(encoding="utf-8")
    for name in (*analysis.RUN_FIGURES, *analysis.STUDY_FIGURES):
        assert f"`{name}`" in text
