"""Figures of heads, attention, training and answers: what is drawn, read back from the Axes."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_support import axes, every_axes, ticks
from made_heads import ODD

from abft_mlx import analysis
from abft_mlx.analysis.figures import (
    attention_map,
    attention_maps,
    confusion,
    confusions,
    detectors,
    head_map,
    head_maps,
    interpolation,
    reliability,
    style,
    texts,
    time_to_accuracy,
    training_curves,
)
from abft_mlx.analysis.figures import ticks as chosen_ticks

NAN = float("nan")


def image(ax: Any) -> np.ndarray:
    """The one image's numbers, NaN where masked."""
    (one,) = ax.images
    return np.ma.filled(np.ma.asarray(one.get_array(), dtype=float), NAN)


def curves(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        one.get_label(): ([*map(float, one.get_xdata())], [*map(float, one.get_ydata())])
        for one in ax.lines
    }


def bar_label(ax: Any) -> str:
    return ax.child_axes[0].get_ylabel()


class TestHeadMap:
    VALUES = np.array([[0.25, 0.5], [NAN, NAN], [0.125, 0.875]])

    def test_layers_upwards_heads_to_the_right(self) -> None:
        ax = head_map.draw(axes(), self.VALUES, "magnitude (share)")
        np.testing.assert_array_equal(image(ax), self.VALUES)
        assert ax.images[0].origin == "lower"
        assert ax.images[0].get_clim() == (0.125, 0.875)
        assert {one.get_position(): one.get_text() for one in ax.texts} == {
            (0, 0): "0.25", (1, 0): "0.50", (0, 2): "0.12", (1, 2): "0.88",
        }  # fmt: skip
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")
        assert bar_label(ax) == "magnitude (share)"
        assert ax.patch.get_hatch() is not None

    def test_a_difference_is_white_at_zero(self) -> None:
        ax = head_map.draw(axes(), np.array([[-0.25, 0.5]]), "change", diverging=True)
        assert ax.images[0].get_clim() == (-0.5, 0.5)
        assert min(ax.images[0].cmap(ax.images[0].norm(0.0))[:3]) > 0.95
        assert [one.get_text() for one in ax.texts] == ["−0.25", "0.50"]

    def test_limits_are_kept(self) -> None:
        ax = head_map.draw(axes(), np.array([[0.5]]), "x", limits=(0, 2))
        assert ax.images[0].get_clim() == (0, 2)

    def test_many_heads_have_no_numbers(self) -> None:
        ax = head_map.draw(axes(), np.random.default_rng(0).random((32, 32)), "x")
        assert not ax.texts

    def test_nothing_but_nan(self) -> None:
        ax = head_map.draw(axes(), np.full((2, 2), NAN), "x")
        assert not ax.texts

    @pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 0.7, 1.0])
    def test_numbers_contrast_with_their_cell(self, value: float) -> None:
        ax = head_map.draw(axes(), np.array([[value]]), "x", limits=(0, 1))
        behind = ax.images[0].cmap(ax.images[0].norm(value))[:3]

        def luminance(colour: Any) -> float:
            linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
            return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

        letter = {"white": 1.0, "black": 0.0}[ax.texts[0].get_color()]
        pair = sorted((luminance(behind), letter))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5

    def test_states_share_a_scale_and_later_ones_show_their_change(self) -> None:
        states = [np.array([[0.25, 0.5]]), np.array([[0.75, 0.25]]), np.array([[0.5, 1.0]])]
        ax = head_maps.draw(axes(), states, ["before", "abft", "end_to_end"], "m")
        panels = ax.child_axes
        for panel, values in zip(panels[:3], states, strict=True):
            np.testing.assert_array_equal(image(panel), values)
            assert panel.images[0].get_clim() == (0.25, 1.0)
        np.testing.assert_array_equal(image(panels[3]), [[0.5, -0.25]])
        np.testing.assert_array_equal(image(panels[4]), [[0.25, 0.5]])
        assert panels[4].images[0].get_clim() == (-0.5, 0.5)
        assert [one.get_title() for one in panels] == [
            "before", "abft", "end_to_end", "abft − before", "end_to_end − before",
        ]  # fmt: skip
        assert not ax.axison

    def test_signed_states_have_zero_in_the_middle(self) -> None:
        ax = head_maps.draw(
            axes(), [np.array([[-0.25]]), np.array([[0.5]])], ["a", "b"], "m", diverging=True
        )
        assert [one.images[0].get_clim() for one in ax.child_axes[:2]] == [(-0.5, 0.5)] * 2

    def test_a_scale_spans_no_less_than_it_is_told(self) -> None:
        tiny, smaller = np.array([[1e-4, 0.0]]), np.array([[0.0, 0.0]])
        ax = head_maps.draw(axes(), [tiny, smaller], ["a", "b"], "m", least=0.02)
        assert [one.images[0].get_clim() for one in ax.child_axes] == [
            (0.0, 0.02), (0.0, 0.02), (-0.02, 0.02),
        ]  # fmt: skip


class TestAttention:
    ROWS = np.array([[0.5, 0.25, 0.25], [NAN, NAN, NAN]])

    def test_heads_by_tokens_with_labels_marked(self) -> None:
        ax = attention_map.draw(
            axes(), self.ROWS, [" good", ":", "ham"], np.array([0, 2]), np.array([True, False]),
            ["L0 H0", "L1 H0"],
        )  # fmt: skip
        np.testing.assert_array_equal(image(ax), self.ROWS)
        assert ticks(ax.xaxis) == [(0, "good"), (1, ":"), (2, "ham")]
        assert ticks(ax.yaxis) == [(0, "L0 H0"), (1, "L1 H0")]
        found = {one.get_label(): one for one in ax.lines}
        assert [*found[attention_map.RIGHT].get_xdata()] == [0]
        assert [*found[attention_map.WRONG].get_xdata()] == [2]
        marks = {one.get_marker() for one in found.values()}
        assert len(marks) == 2
        assert {one.get_text() for one in ax.get_legend().get_texts()} == set(found)
        # The same scale in every figure: the square root of 0 to 1.
        np.testing.assert_allclose(ax.images[0].norm([0, 0.25, 1]), [0, 0.5, 1])
        assert ax.get_xlabel() == "token of the prompt"

    def test_states_stand_above_one_another(self) -> None:
        other = np.array([[0.25, 0.5, 0.25], [0, 0, 1.0]])
        ax = attention_maps.draw(
            axes(), [self.ROWS, other], ["a", "b", "c"], np.array([1]), np.array([False]),
            ["L0 H0", "L1 H0"], ["before", "after"],
        )  # fmt: skip
        upper, lower = ax.child_axes
        np.testing.assert_array_equal(image(upper), self.ROWS)
        np.testing.assert_array_equal(image(lower), other)
        assert (upper.get_ylabel(), lower.get_ylabel()) == ("before", "after")
        assert ticks(upper.xaxis) == []
        assert [text for _, text in ticks(lower.xaxis)] == ["a", "b", "c"]
        assert upper.get_legend() is not None
        assert lower.get_legend() is None
        for panel in (upper, lower):
            wrong = next(one for one in panel.lines if one.get_label() == attention_map.WRONG)
            assert [*wrong.get_xdata()] == [1]

    def test_of_many_tokens_labels_and_the_last_are_named(self) -> None:
        labels = np.array([40, 41, 150, 222])
        rows = np.full((4, 300), 1 / 300)
        ax = attention_map.draw(
            axes(), rows, [f"t{n}" for n in range(300)], labels, np.ones(4, bool), list("abcd")
        )
        shown = {int(place): text for place, text in ticks(ax.xaxis)}
        assert all(text == f"t{place}" for place, text in shown.items())
        # Of two that are too close, the first.
        assert {299, 0, 40, 150, 222} <= set(shown)
        assert 41 not in shown
        assert len(shown) < 80
        found = next(one for one in ax.lines if one.get_label() == attention_map.RIGHT)
        assert [*found.get_xdata()] == [40, 41, 150, 222]

    @pytest.mark.parametrize("count", [1, 2, 10, 50, 1000])
    def test_chosen_places_are_apart(self, count: int) -> None:
        found = chosen_ticks.chosen(count, 20, [count - 1, 0])
        assert found == sorted(set(found))
        assert all(0 <= one < count for one in found)
        assert {count - 1, 0} <= set(found)
        assert np.all(np.diff(found) >= count / 20) or count <= 20
        assert count > 20 or found == list(range(count))
        assert count <= 20 or len(found) >= 8


class TestTexts:
    def test_odd_tokens_are_drawn_letter_by_letter(self) -> None:
        assert texts.plain("a\nb\tc") == r"a\nb\tc"
        assert texts.plain("$x$") == r"\$x\$"
        assert texts.plain("\x00\u202e\ud800\u2028") == "□□□□"
        assert texts.plain("中") == "□"
        assert texts.plain("é😀") == "é😀"
        assert texts.token(" of") == "of"
        assert texts.token("") == '""'
        assert texts.token("  ") == '"  "'
        assert texts.short("abcdefghij", 7) == "abcd…ij"
        assert len(texts.short("a" * 100, 16)) == 16
        assert texts.name("_hidden") == " _hidden"

    def test_no_text_warns_or_becomes_a_formula(self) -> None:
        ax = axes()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ax.set_xticks(range(len(ODD)), [texts.token(one) for one in ODD], rotation=90)
            for index, one in enumerate(ODD):
                ax.plot([0], [index], label=texts.name(one) or '""')
            style.legend(ax)
            ax.figure.draw_without_rendering()
        shown = [one.get_text() for one in ax.get_legend().get_texts()]
        assert len(shown) == len(ODD)
        drawn = [one._preprocess_math(one.get_text()) for one in ax.get_xticklabels()]
        assert all(kind is False for _, kind in drawn)
        assert "$x_1$" in [text for text, _ in drawn]


class TestTraining:
    SEEN = np.array([32.0, 64.0, 96.0])

    def test_a_panel_for_each_quantity(self) -> None:
        run = {
            "loss": np.array([3.0, 2, 1]),
            "punish": np.array([2.0, 1, 0.5]),
            "reward": np.array([1.5, 1, 0.5]),
            "induction_heads": np.array([4.0, 5, 4]),
            "A": np.array([0.5, 0.25, 0.75]),
            "validation_accuracy": np.array([NAN, 0.5, 0.75]),
        }
        ax = training_curves.draw(axes(), [self.SEEN], [run], ["abft"])
        found = {one.get_ylabel().replace("\n", " "): curves(one)["abft"] for one in ax.child_axes}
        assert found == {
            "loss": ([32, 64, 96], [3, 2, 1]),
            "punish term (attention)": ([32, 64, 96], [2, 1, 0.5]),
            "reward term (attention)": ([32, 64, 96], [1.5, 1, 0.5]),
            "induction heads in a prompt": ([32, 64, 96], [4, 5, 4]),
            "punish weight A": ([32, 64, 96], [0.5, 0.25, 0.75]),
            "validation accuracy (%)": ([64, 96], [50, 75]),
        }
        assert ax.child_axes[-1].get_xlabel() == "training prompts seen"
        assert len({one.get_xlim() for one in ax.child_axes}) == 1
        assert ax.child_axes[0].get_legend() is None

    def test_runs_side_by_side(self) -> None:
        first = {"loss": np.array([3.0, 2, 1]), "A": np.array([0.5, 0.5, 0.5])}
        second = {"loss": np.array([1.0, 1]), "validation_accuracy": np.array([NAN, NAN])}
        spread = [{"loss": np.array([0.5, 0.5, 0.5])}, {}]
        ax = training_curves.draw(
            axes(), [self.SEEN, self.SEEN[:2]], [first, second], ["abft", "end_to_end"], spread
        )
        loss, weight = ax.child_axes
        assert curves(loss) == {
            "abft": ([32, 64, 96], [3, 2, 1]), "end_to_end": ([32, 64], [1, 1]),
        }  # fmt: skip
        assert [*curves(weight)] == ["abft"]
        styles = {(one.get_color(), one.get_linestyle()) for one in loss.lines}
        assert len(styles) == 2
        assert weight.lines[0].get_color() == loss.lines[0].get_color()
        (band,) = loss.collections
        edge = band.get_paths()[0].vertices
        assert (edge[:, 1].min(), edge[:, 1].max()) == (0.5, 3.5)
        assert [one.get_text() for one in loss.get_legend().get_texts()] == ["abft", "end_to_end"]


class TestAnswers:
    COUNTS = np.array([[3, 1], [0, 0]])

    def test_confusion_counts_and_shares(self) -> None:
        ax = confusion.draw(axes(), self.COUNTS, ["ham", "$pam"])
        np.testing.assert_array_equal(image(ax), [[75, 25], [0, 0]])
        assert ax.images[0].get_clim() == (0, 100)
        # x is the answer, y the gold label, the first one above.
        found = {one.get_position(): one.get_text() for one in ax.texts}
        assert found == {(0, 0): "3", (1, 0): "1", (0, 1): "0", (1, 1): "0"}
        assert ax.get_ylim()[0] > ax.get_ylim()[1]
        assert ticks(ax.xaxis) == ticks(ax.yaxis) == [(0, "ham"), (1, r"\$pam")]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("answer", "gold label")

    def test_many_classes_have_no_numbers_and_some_names(self) -> None:
        names = [f"class {n}" for n in range(77)]
        ax = confusion.draw(axes(), np.eye(77), names)
        assert not ax.texts
        shown = ticks(ax.yaxis)
        assert 10 < len(shown) < 77
        assert all(text == f"class {int(place)}" for place, text in shown)

    def test_states_of_confusion(self) -> None:
        ax = confusions.draw(axes(), [self.COUNTS, self.COUNTS.T], ["a", "b"], ["before", "after"])
        first, second = ax.child_axes
        np.testing.assert_array_equal(image(first), [[75, 25], [0, 0]])
        np.testing.assert_array_equal(image(second), [[100, 0], [100, 0]])
        assert (first.get_title(), second.get_title()) == ("before", "after")

    def test_reliability(self) -> None:
        confidence = np.array([[NAN, 0.75], [0.25, 0.875]])
        accuracy = np.array([[NAN, 0.5], [0.125, 1.0]])
        count = np.array([[0, 8], [2, 6]])
        ax = reliability.draw(axes(), confidence, accuracy, count, ["before", "after"])
        upper, lower = ax.child_axes
        found = curves(upper)
        assert found["before"] == ([75], [50])
        assert found["after"] == ([25, 87.5], [12.5, 100])
        assert found["calibrated"] == ([0, 100], [0, 100])
        heights = {one.get_label(): [bar.get_height() for bar in one] for one in lower.containers}
        assert heights == {"before": [0, 8], "after": [2, 6]}
        # Each bar lies in its bin, and none on another.
        for one in lower.containers:
            for n, bar in enumerate(one):
                assert 50 * n <= bar.get_x()
                assert bar.get_x() + bar.get_width() <= 50 * (n + 1)
        edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in lower.patches)
        assert all(b <= c + 1e-9 for (_, b), (c, _) in itertools.pairwise(edges))


class TestOthers:
    def test_detectors(self) -> None:
        magnitude = np.array([[0.1, 0.2], [NAN, NAN], [0.3, 0.4]])
        induction = np.array([[0.5, 0.6], [NAN, NAN], [0.7, NAN]])
        ax = detectors.draw(axes(), magnitude, induction)
        (points,) = ax.collections
        np.testing.assert_allclose(points.get_offsets(), [[0.5, 0.1], [0.6, 0.2], [0.7, 0.3]])
        assert points.get_array().tolist() == [0, 0, 2]
        assert "repeated random tokens" in ax.get_xlabel()
        assert "labels" in ax.get_ylabel()

    def test_interpolation(self) -> None:
        share = np.array([0.0, 0.5, 1.0])
        accuracy = np.array([[0.5, 0.7, 0.6], [0.7, 0.9, 0.6]])
        ax = interpolation.draw(axes(), share, accuracy, ("abft", "end_to_end"), 0.4)
        found = curves(ax)
        assert found["between the two"] == ([0, 0.5, 1], pytest.approx([60, 80, 60]))
        assert found["abft"] == ([0], pytest.approx([60]))
        assert found["end_to_end"] == ([1], pytest.approx([60]))
        assert found["base"][1] == [40, 40]
        edge = ax.collections[0].get_paths()[0].vertices
        around = 100 * np.std([0.7, 0.9], ddof=1)
        at = edge[np.isclose(edge[:, 0], 0.5)][:, 1]
        assert (at.min(), at.max()) == pytest.approx((80 - around, 80 + around))
        assert ax.get_xlabel() == "share of end_to_end, the rest abft"

    def test_time_to_accuracy(self) -> None:
        ax = time_to_accuracy.draw(
            axes(), [np.array([1.0, 2]), np.array([4.0])], [np.array([0.5, 0.75]), np.array([0.6])],
            ["exact", "fast"], 0.25,
        )  # fmt: skip
        found = curves(ax)
        assert found["exact"] == ([1, 2], [50, 75])
        assert found["fast"] == ([4], [60])
        assert found["untrained"][1] == [25, 25]
        assert ax.get_xscale() == "log"

    def test_sixteen_series_look_different(self) -> None:
        looks = {(style.colour(n), style.marker(n)) for n in range(16)}
        assert len(looks) == 16
        assert len({(style.colour(n), style.hatch(n)) for n in range(16)}) == 16
        assert len({(style.colour(n), style.dashes(n)) for n in range(16)}) == 16

    def test_panels_are_apart_and_inside(self) -> None:
        ax = axes()
        made = style.panels(ax, [1, 2, 1], gaps=0.2)
        assert [*every_axes(ax.figure)] == [ax, *made]
        boxes = [one.get_position() for one in made]
        ax.figure.draw_without_rendering()
        boxes = [one.get_window_extent() for one in made]
        whole = ax.get_window_extent()
        assert all(upper.y0 > lower.y1 for upper, lower in itertools.pairwise(boxes))
        assert boxes[0].y1 == pytest.approx(whole.y1)
        assert boxes[-1].y0 == pytest.approx(whole.y0)
        assert boxes[1].height == pytest.approx(2 * boxes[0].height)


class TestDocs:
    def test_the_page_names_every_figure_and_its_function(self, checkout: Path) -> None:
        text = (checkout / "docs" / "figures.md").read_text(encoding="utf-8")
        run, study = text.split("## Of a study")
        for names, page in ((analysis.run_figure_names(), run), (analysis.figure_names(), study)):
            listed = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, flags=re.MULTILINE)
            assert {one for cell in listed for one in re.findall(r"\w+", cell)} == set(names)
        for module in set(re.findall(r"`(\w+)\.draw`", text)):
            assert callable(importlib.import_module(f"abft_mlx.analysis.figures.{module}").draw)

    def test_the_example_runs(self, checkout: Path, tmp_path: Path) -> None:
        text = (checkout / "docs" / "figures.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True,
            text=True, env={**os.environ, "PYTHONPATH": str(checkout)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "heads.svg").read_text(encoding="utf-8").startswith("<?xml")
