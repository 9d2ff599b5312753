"""Figures of a study: the numbers that are drawn, read back from the Axes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_cells import answers, cell, consistency, run, study, summary
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from abft_mlx import analysis
from abft_mlx.analysis.facts import facts
from abft_mlx.analysis.figures import (
    accuracy,
    data_efficiency,
    extrapolation,
    grid,
    head_count,
    label_attention,
    plane,
    shift,
    style,
    unseen,
)
from abft_mlx.analysis.plots import plots
from abft_mlx.errors import RecipeError

NAN = float("nan")


def axes() -> Any:
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def drawn(cells: list[dict], name: str, **changes: Any) -> list[tuple[Any, Any]]:
    """Each plot that a study's figure needs, and the Axes that it drew on."""
    made, notes = plots(facts(study(figures=[name], **changes), cells))
    assert not notes
    return [(one, one.draw(axes())) for one in made]


def bars(ax: Any) -> dict[str, list[float]]:
    """Heights of bars by their label."""
    return {
        one.get_label(): [bar.get_height() for bar in one]
        for one in ax.containers
        if hasattr(one, "patches")
    }


def curves(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        one.get_label(): ([*map(float, one.get_xdata())], [*map(float, one.get_ydata())])
        for one in ax.lines
    }


def band(ax: Any, index: int, x: float) -> tuple[float, float]:
    """Lowest and highest y of a band at x."""
    points = ax.collections[index].get_paths()[0].vertices
    at = points[np.isclose(points[:, 0], x)][:, 1]
    return float(at.min()), float(at.max())


class TestDrawing:
    def test_accuracy_bars_and_the_papers(self) -> None:
        ax = accuracy.draw(
            axes(), np.array([[0.5, NAN], [0.75, 0.25]]), np.array([[NAN, NAN], [0.125, 0]]),
            np.array([[0.625, NAN], [NAN, NAN]]), ["vanilla", "abft"], ["A", "B"],
        )  # fmt: skip
        found = bars(ax)
        assert found["abft"] == [75, 25]
        assert found["vanilla"][0] == 50
        assert [one.get_text() for one in ax.get_xticklabels()] == ["A", "B"]
        (line,) = [one for one in ax.collections if one.get_label() == "the paper"]
        (segment,) = line.get_segments()
        assert segment[:, 1].tolist() == [62.5, 62.5]
        # It lies across the bar that it belongs to.
        bar = ax.patches[0]
        assert segment[:, 0] == pytest.approx([bar.get_x(), bar.get_x() + bar.get_width()])
        error = [one for one in ax.collections if one.get_label() == "_nolegend_"][-1]
        assert error.get_segments()[0][:, 1].tolist() == [62.5, 87.5]
        assert ax.get_ylabel() == "accuracy (%)"
        assert {"vanilla", "abft", "the paper"} == {
            one.get_text() for one in ax.get_legend().get_texts()
        }

    def test_bars_do_not_overlap(self) -> None:
        ax = accuracy.draw(axes(), *(np.full((3, 2), 0.5),) * 3, ["a", "b", "c"], ["A", "B"])
        edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(edges))

    def test_data_efficiency(self) -> None:
        ax = data_efficiency.draw(
            axes(), np.array([32, 64]), np.array([[0.5, 0.6]]), np.array([[0.4, 0.5]]),
            np.array([[0.6, 0.7]]), ["abft"], 0.45,
        )  # fmt: skip
        found = curves(ax)
        assert found["abft"] == ([32, 64], pytest.approx([50, 60]))
        assert found["vanilla"][1] == [45, 45]
        assert band(ax, 0, 64) == pytest.approx((50, 70))
        assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "training examples")

    def test_head_count(self) -> None:
        ax = head_count.draw(
            axes(), [np.array([32, 64])], [np.array([4.0, 3.0])], [np.array([0.5, 0.25])], ["abft"]
        )
        assert curves(ax)["abft"] == ([32, 64], [4, 3])
        assert band(ax, 0, 32) == (3.5, 4.5)

    def test_grid_has_punish_upwards_and_reward_to_the_right(self) -> None:
        values = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, NAN]])
        ax = grid.draw(axes(), values, np.array([0, 0.5]), np.array([0, 1, 2]), (0.1, 0.5), "t")
        (image,) = ax.images
        np.testing.assert_allclose(image.get_array(), 100 * values)
        assert image.origin == "lower"
        assert image.get_clim() == (10, 50)
        assert {one.get_text(): one.get_position() for one in ax.texts}["40.0"] == (0, 1)
        assert len(ax.texts) == 5
        assert [one.get_text() for one in ax.get_yticklabels()] == ["0", "0.5"]
        assert "B" in ax.get_xlabel()
        assert "A" in ax.get_ylabel()

    def test_plane(self) -> None:
        factors = np.array([0.0, 1.0])
        values = np.array([[0.5, 0.6], [0.8, 0.7]])
        published = {"base": 0.58, "first": 0.84, "second": 0.86, "best": 0.89}
        ax = plane.draw(axes(), values, factors, ("abft", "end_to_end"), published)
        found = curves(ax)
        assert found["abft (80.0; paper 84)"] == ([1], [0])
        assert found["end_to_end (60.0; paper 86)"] == ([0], [1])
        assert found["base (50.0; paper 58)"] == ([0], [0])
        assert found["best (80.0; paper 89)"] == ([1], [0])
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("factor of abft", "factor of end_to_end")
        # Contours hold (y, x): the corner of abft alone is at the right, below.
        levels = next(one for one in ax.collections if len(one.get_paths()) > 2)
        right = [i for i, path in enumerate(levels.get_paths())
                 if len(path.vertices) and path.contains_point((0.97, 0.02))]  # fmt: skip
        assert right[-1] == len(levels.get_paths()) - 1

    def test_extrapolation(self) -> None:
        validation = np.array([[0.4, 0.6], [0.5, 0.7]])
        ax = extrapolation.draw(
            axes(), np.array([1.0, 2.0]), validation, validation - 0.1, np.array([2.0, 1.0])
        )
        found = curves(ax)
        assert found["validation"] == ([1, 2], pytest.approx([45, 65]))
        assert found["test"][1] == pytest.approx([35, 55])
        assert found["chosen on validation"][0] == [2, 1]
        around = 100 * np.std([0.4, 0.5], ddof=1)
        assert band(ax, 0, 1.0) == pytest.approx((45 - around, 45 + around))

    def test_unseen(self) -> None:
        ax = unseen.draw(
            axes(), np.array([[0.5, 0.25], [0.75, 0.5]]), np.full((2, 2), NAN),
            np.array([[0.5576, 0.1348], [NAN, NAN]]), np.array([0.3, NAN]), ["vanilla", "abft"],
        )  # fmt: skip
        assert bars(ax) == {"vanilla": [50, 25], "abft": [75, 50]}
        assert curves(ax)["vanilla, zero-shot"][1] == [30, 30]
        assert "abft, zero-shot" not in curves(ax)

    def test_layers(self) -> None:
        ax = shift.draw(axes(), [np.array([0.1, 0.3])], [np.array([0.0, 0.05])], ["abft W_Q"])
        assert curves(ax)["abft W_Q"] == ([0, 1], [0.1, 0.3])
        assert band(ax, 0, 1) == pytest.approx((0.25, 0.35))
        ax = label_attention.draw(
            axes(), [np.array([0.2, 0.4])], [np.array([0.1, 0.3])], ["before"]
        )
        assert curves(ax)["before, all labels"][1] == [0.2, 0.4]
        assert curves(ax)["before, gold label"][1] == [0.1, 0.3]

    def test_colours_differ_in_brightness(self) -> None:
        def brightness(colour: str) -> float:
            return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))

        assert len({style.colour(i) for i in range(8)}) == 8
        shades = sorted(brightness(style.colour(i)) for i in range(3))
        assert min(np.diff(shades)) > 0.02
        assert len({(style.marker(i), style.hatch(i)) for i in range(8)}) == 8


class TestFromCells:
    def test_accuracy(self) -> None:
        cells = [cell("untrained", {"vanilla": answers(0.5, 40)}, model="GPT2-L")]
        cells += [
            cell("abft", answers(rate, 40), seed=seed, model="GPT2-L")
            for seed, rate in ((1, 0.7), (2, 0.8))
        ]
        cells.append(cell("abft", answers(0.1, 40), seed=1, model="GPT2-L", sweep={"a.b": 1}))
        ((one, ax),) = drawn(cells, "accuracy", paper={"table": "table1"})
        assert bars(ax) == {"vanilla": [50], "abft": [pytest.approx(75)]}
        assert one.stem == "accuracy-GPT2-L"
        assert one.caption == "GPT2-L; sst2; n = 40 prompts; 2 training seeds"
        ys = sorted(
            segment[0, 1]
            for line in ax.collections
            for segment in line.get_segments()
            if np.ptp(segment[:, 0]) > 0
        )
        assert ys == pytest.approx([56.35, 88.18])

    def test_consistency(self) -> None:
        cells = [
            cell("untrained", model="GPT2-XL", evaluation={"robustness": consistency(0.8, 0.6)})
        ]
        cells.append(
            cell("abft", seed=1, model="GPT2-XL", evaluation={"robustness": consistency(0.9, 0.7)})
        )
        ((_, ax),) = drawn(cells, "consistency", paper={"table": "table3"})
        found = bars(ax)
        assert found["vanilla"] == pytest.approx([80, 60])
        assert found["abft"] == pytest.approx([90, 70])
        heights = {
            round(float(segment[0, 1]), 2)
            for line in ax.collections
            for segment in line.get_segments()
            if np.ptp(segment[:, 0]) > 0
        }
        assert heights == {81.28, 68.38, 91.74, 82.75}

    def test_unseen(self) -> None:
        parts = {
            kind: summary(answers(rate, 40))
            for kind, rate in (("random", 0.5), ("unseen", 0.25), ("zero_shot", 0.75))
        }
        one = cell("untrained", task="trec", model="Llama3-8B", evaluation={"unseen": parts})
        ((_, ax),) = drawn([one], "unseen")
        assert bars(ax)["vanilla"] == [50, 25]
        assert curves(ax)["vanilla, zero-shot"][1] == [75, 75]
        (paper,) = [line for line in ax.collections if line.get_label() == "the paper"]
        assert [one[0, 1] for one in paper.get_segments()] == pytest.approx([55.76, 13.48])

    def test_data_efficiency(self) -> None:
        cells = [cell("untrained", {"vanilla": answers(0.5, 40)})]
        cells += [
            cell("abft", answers(rate, 40), seed=1, sweep={"training.examples": size})
            for size, rate in ((64, 0.7), (32, 0.6))
        ]
        ((one, ax),) = drawn(cells, "data_efficiency")
        assert curves(ax)["abft"] == ([32, 64], pytest.approx([60, 70]))
        assert curves(ax)["vanilla"][1] == [50, 50]
        low, high = band(ax, 0, 32)
        assert low < 60 < high
        assert "95% intervals" in one.caption

    def test_head_count_averages_runs(self) -> None:
        cells = [
            cell("abft", seed=seed, run=run(heads))
            for seed, heads in ((1, [4.0, 2.0]), (2, [6.0, 4.0]))
        ]
        cells.append(cell("no_pid", seed=1, run=run([5.0, 5.0, 5.0])))
        cells.append(cell("abft", seed=1, run=run([9.0]), sweep={"a.b": 1}))
        ((_, ax),) = drawn(cells, "head_count")
        assert curves(ax) == {"abft": ([32, 64], [5, 3]), "no_pid": ([32, 64, 96], [5, 5, 5])}
        assert band(ax, 0, 64) == pytest.approx((3 - np.sqrt(2), 3 + np.sqrt(2)))

    def test_grid(self) -> None:
        rates = {(0, 1): 0.5, (0, 2): 0.6, (0.5, 1): 0.7, (0.5, 2): 0.8}
        cells = [
            cell(method, answers(rate - less, 40), seed=1,
                 sweep={"objective.punish": a, "objective.reward": b})
            for method, less in (("abft", 0), ("no_pid", 0.4))
            for (a, b), rate in rates.items()
        ]  # fmt: skip
        made = drawn(cells, "grid")
        assert [one.stem for one, _ in made] == ["grid-demo-abft", "grid-demo-no_pid"]
        first, second = (ax.images[0] for _, ax in made)
        np.testing.assert_allclose(first.get_array(), [[50, 60], [70, 80]])
        np.testing.assert_allclose(second.get_array(), [[10, 20], [30, 40]])
        assert first.get_clim() == second.get_clim() == pytest.approx((10, 80))

    def test_plane_averages_seeds(self) -> None:
        def made(seed: int, more: float) -> dict:
            values = [[0.5 + more, 0.6 + more], [0.8 + more, 0.7 + more]]
            part = {"axes": ["abft", "end_to_end"], "factors": [0.0, 1.0], "prompts": 40,
                    "accuracy": values}  # fmt: skip
            return cell("plane", seed=seed, plane=part, run=None, model="GPT2-XL")

        ((one, ax),) = drawn([made(1, 0.0), made(2, 0.1)], "plane")
        assert curves(ax)["abft (85.0; paper 84)"] == ([1], [0])
        assert "n = 40 prompts; 2 training seeds" in one.caption

    def test_extrapolation(self) -> None:
        part = {
            "factors": [1.0, 2.0], "chosen": 2.0,
            "validation": {"prompts": 16, "accuracy": [0.5, 0.6]},
            "test": {"prompts": 40, "accuracy": [0.4, 0.45]},
        }  # fmt: skip
        ((one, ax),) = drawn([cell("extrapolate", seed=1, extrapolation=part)], "extrapolation")
        assert curves(ax)["test"] == ([1, 2], [40, 45])
        assert curves(ax)["chosen on validation"][0] == [2]
        assert "n = 40 test and 16 validation prompts" in one.caption

    def test_layers(self) -> None:
        census = {"prompts": 8, "magnitude": [[0.2, 0.4], [0.6, None]],
                  "correctness": [[0.0, 0.2], [0.4, None]]}  # fmt: skip
        cells = [
            cell("untrained", census=census),
            *(
                cell("abft", seed=seed, census=census, shift={"q": [q, 0.5], "k": [0.2, 0.4]})
                for seed, q in ((1, 0.1), (2, 0.3))
            ),
        ]
        ((_, ax),) = drawn(cells, "label_attention")
        found = curves(ax)
        assert found["before, all labels"][1] == pytest.approx([0.3, 0.6])
        assert found["abft, gold label"][1] == pytest.approx([0.2, 0.5])
        ((_, ax),) = drawn(cells, "shift")
        assert curves(ax)["abft W_Q"][1] == pytest.approx([0.2, 0.5])
        assert curves(ax)["abft W_K"][1] == pytest.approx([0.2, 0.4])


class TestFiles:
    def test_svg_and_png_hold_no_date(self, tmp_path: Path) -> None:
        draw = partial(head_count.draw, seen=[np.array([1, 2])], heads=[np.array([1, 2])],
                       spread=[np.array([0, 0])], methods=["abft"])  # fmt: skip
        made = style.write(tmp_path / "one", draw, "n = 8; 2 seeds")
        assert [path.name for path in made] == ["one.svg", "one.png"]
        again = style.write(tmp_path / "two", draw, "n = 8; 2 seeds")
        assert [path.read_bytes() for path in made] == [path.read_bytes() for path in again]
        text = made[0].read_text(encoding="utf-8")
        assert "n = 8; 2 seeds" in text
        assert "dc:date" not in text
        assert b"Software" not in made[1].read_bytes()
        assert made[1].read_bytes().startswith(b"\x89PNG")

    def test_every_figure_says_what_it_lacks(self, tmp_path: Path) -> None:
        names = analysis.figure_names()
        made = analysis.write_study(tmp_path, study(figures=names), [])
        assert len(made) == 3
        assert len(made.notes) == len(names) == 14

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"figures": ["pie"]}, "no figure is called pie; there are accuracy,"),
            ({"paper": {"table": "table9"}}, "paper has table: table9; write table: and one of"),
            ({"paper": {"figure": "table1"}}, "paper has figure: table1"),
        ],
    )
    def test_what_does_not_exist_is_refused(self, tmp_path: Path, changes: dict, told: str) -> None:
        with pytest.raises(RecipeError, match=told):
            analysis.write_study(tmp_path / "out", study(**changes), [])
        assert not (tmp_path / "out").exists()

    def test_without_matplotlib_the_tables_are_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        made = analysis.write_study(
            tmp_path, study(figures=["accuracy"]), [cell("abft", answers(0.5, 40), seed=1)]
        )
        assert [path.name for path in made] == ["table.md", "table.csv", "study.json"]
        assert made.notes == (
            "no figures: matplotlib is not installed; pip install 'abft-mlx[plots]'",
        )

    def test_importing_draws_nothing(self) -> None:
        program = "import sys, abft_mlx.analysis; print('matplotlib' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.strip() == "False", done.stderr
