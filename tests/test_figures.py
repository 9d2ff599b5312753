"""Figures from arrays: what is drawn, how it is written, and the page that documents them."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_support import bars, curves, drawn, image, ticks
from made_heads import ODD, example

from abft_mlx import analysis
from abft_mlx.analysis import figures
from abft_mlx.analysis.figures import style
from abft_mlx.analysis.plots import Plot, confusion_heights, on_axes

NAN = float("nan")
RANDOM = np.random.default_rng(0)


def axes_of(function: Any, **arguments: Any) -> Any:
    """The Axes of a figure that has one."""
    (axes,) = drawn(on_axes(function, **arguments))
    return axes


class TestHeads:
    def test_a_map_has_layers_upwards_and_heads_to_the_right(self) -> None:
        values = np.array([[0.25, 0.5], [NAN, NAN], [0.125, 0.875]])
        axes = axes_of(figures.head_map, values=values, label="magnitude (share)")
        np.testing.assert_array_equal(image(axes), values)
        assert axes.images[0].origin == "lower"
        assert axes.images[0].get_clim() == (0.125, 0.875)
        assert {text.get_position(): text.get_text() for text in axes.texts} == {
            (0, 0): "0.25", (1, 0): "0.50", (0, 2): "0.12", (1, 2): "0.88",
        }  # fmt: skip
        assert axes.patch.get_hatch() is not None

    def test_a_scale_spans_no_less_than_it_should(self) -> None:
        states = [np.array([[1e-4, 0.0]]), np.array([[0.0, 0.0]])]
        panels = drawn(
            partial(figures.head_maps, states=states, names=["a", "b"], label="m", least=0.02)
        )
        assert [panel.images[0].get_clim() for panel in panels] == [
            (0.0, 0.02), (0.0, 0.02), (-0.02, 0.02),
        ]  # fmt: skip

    def test_many_heads_have_no_numbers_and_none_is_drawn_too(self) -> None:
        assert not axes_of(figures.head_map, values=RANDOM.random((32, 32)), label="x").texts
        assert not axes_of(figures.head_map, values=np.full((2, 2), NAN), label="x").texts

    @pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 0.7, 1.0])
    def test_numbers_contrast_with_their_cell(self, value: float) -> None:
        axes = axes_of(figures.head_map, values=np.array([[value]]), label="x", limits=(0, 1))
        behind = axes.images[0].cmap(axes.images[0].norm(value))[:3]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in behind]
        letter = {"white": 1.0, "black": 0.0}[axes.texts[0].get_color()]
        pair = sorted((float(np.dot(linear, (0.2126, 0.7152, 0.0722))), letter))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5

    def test_of_two_labels_that_are_too_close_the_first_is_named(self) -> None:
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


class TestResults:
    def test_the_papers_number_lies_across_its_bar(self) -> None:
        axes = axes_of(
            figures.accuracy, accuracy=np.array([[0.5, NAN], [0.75, 0.25]]),
            spread=np.array([[NAN, NAN], [0.125, 0]]), tasks=["A", "B"],
            paper=np.array([[0.625, NAN], [NAN, NAN]]), methods=["vanilla", "_abft"],
        )  # fmt: skip
        assert bars(axes)[" _abft"] == [75, 25]
        (line,) = [one for one in axes.collections if one.get_label() == "the paper"]
        (segment,) = line.get_segments()
        bar = axes.patches[0]
        assert segment[:, 1].tolist() == [62.5, 62.5]
        assert segment[:, 0] == pytest.approx([bar.get_x(), bar.get_x() + bar.get_width()])
        labels = {text.get_text() for text in axes.figure.legends[0].get_texts()}
        assert labels == {"vanilla", " _abft", "the paper"}

    def test_contours_of_a_plane_have_the_first_method_to_the_right(self) -> None:
        values = np.array([[0.5, 0.6], [0.8, 0.7]])
        published = {"base": 0.58, "first": 0.84, "second": 0.86, "best": 0.89}
        axes = axes_of(
            figures.plane, accuracy=values, factors=np.array([0.0, 1.0]), paper=published,
            names=("abft", "end_to_end"),
        )  # fmt: skip
        assert curves(axes)["abft (80.0; paper 84)"] == ([1], [0])
        assert curves(axes)["end_to_end (60.0; paper 86)"] == ([0], [1])
        assert curves(axes)["best (80.0; paper 89)"] == ([1], [0])
        levels = next(one for one in axes.collections if len(one.get_paths()) > 2).get_paths()
        right = [n for n, path in enumerate(levels)
                 if len(path.vertices) and path.contains_point((0.97, 0.02))]  # fmt: skip
        assert right[-1] == len(levels) - 1

    def test_bars_of_a_reliability_diagram_stay_in_their_bins(self) -> None:
        upper, lower = drawn(
            partial(
                figures.reliability, confidence=np.array([[NAN, 0.75], [0.25, 0.875]]),
                accuracy=np.array([[NAN, 0.5], [0.125, 1.0]]), count=np.array([[0, 8], [2, 6]]),
                names=["before", "after"],
            )
        )  # fmt: skip
        assert curves(upper)["before"] == ([75], [50])
        assert bars(lower) == {"before": [0, 8], "after": [2, 6]}
        for container in lower.containers:
            for n, bar in enumerate(container):
                assert 50 * n <= bar.get_x() < bar.get_x() + bar.get_width() <= 50 * (n + 1)

    def test_series_look_different(self) -> None:
        for choices in (style.MARKERS, style.HATCHES, style.DASHES):
            looks = {(style.colour(n), style.cycled(choices, n)) for n in range(16)}
            assert len(looks) == 16


class TestFiles:
    @pytest.mark.parametrize("width", list(style.WIDTHS))
    def test_many_classes_and_odd_names(self, tmp_path: Path, width: str) -> None:
        names = ["a class with a very long name", "_under", "$do$lar", "中文", *map(str, range(73))]
        counts = [RANDOM.integers(0, 2000, (77, 77)) for _ in range(2)]
        draw = partial(figures.confusions, counts=counts, names=names, state_names=["a", "b"])
        plot = Plot("one", draw, "n = 3", *confusion_heights(77, 2))
        (path,) = plot.write(tmp_path, ("svg",), width)
        root = ET.parse(path).getroot()
        inches = {"page": 6.4, "column": 3.3}[width]
        assert float(root.attrib["width"].removesuffix("pt")) == pytest.approx(72 * inches)

    def test_formats_are_the_same_bytes_and_hold_text_as_text(self, tmp_path: Path) -> None:
        made = example(1, 2, len(ODD), ("before",))
        draw = on_axes(
            figures.attention_map, rows=made.rows["before"][0], tokens=made.tokens,
            label_positions=made.label_positions, right=made.right, names=["L0 H0", "L0 H1"],
        )  # fmt: skip
        written = [
            style.write(tmp_path / name, draw, "n = 1; 50% of $5", formats=style.FORMATS)
            for name in ("model-0.5B", "two")
        ]
        assert [path.name for path in written[0]] == [
            "model-0.5B.svg", "model-0.5B.png", "model-0.5B.pdf",
        ]  # fmt: skip
        assert [path.read_bytes() for path in written[0]] == [
            path.read_bytes() for path in written[1]
        ]
        svg = written[0][0].read_text(encoding="utf-8")
        for text in ("&lt;script&gt;", "$x_1$", "n = 1; 50% of $5", "attention (share)", "L0 H1",
                     r"\n", r"\u202eright", "中文"):  # fmt: skip
            assert f">{text}</text>" in svg, text
        assert "dc:date" not in svg
        assert written[0][2].read_bytes().startswith(b"%PDF")
        assert b"CreationDate" not in written[0][2].read_bytes()

    def test_importing_draws_nothing(self) -> None:
        program = "import sys, abft_mlx.analysis; print('matplotlib' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.strip() == "False", done.stderr


def test_the_page_names_every_figure(checkout: Path) -> None:
    text = (checkout / "docs" / "heads.md").read_text(encoding="utf-8")
    for name in (*analysis.run_figure_names(), *analysis.figure_names()):
        assert f"`{name}`" in text
