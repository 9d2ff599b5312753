"""Figures of a study, from made-up cells: the numbers that are drawn, read back from the Axes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_support import band, bars, by_label, curves, ticks
from figure_support import drawn as panels_of
from made_cells import answers, cell, consistency, run, study, summary
from made_heads import evaluated

from abft_mlx import analysis
from abft_mlx.analysis.study_data import facts, read_facts
from abft_mlx.analysis.study_plots import study_plots, without
from abft_mlx.errors import RecipeError


def drawn(cells: list[dict], name: str, **changes: Any) -> list[tuple[Any, list[Any]]]:
    """Each plot that a study's figure needs, and the Axes that it drew on."""
    found = read_facts(facts(study(figures=[name], **changes), cells))
    return [(plot, panels_of(plot.draw)) for plot in study_plots(found, [name])[name]]


def missing(cells: list[dict], name: str) -> str:
    """What is said of a figure that is not drawn."""
    found = read_facts(facts(study(), cells))
    assert study_plots(found, [name]) == {name: []}
    return without(name, found)


def trained(method: str, losses: list[float], seed: int, **changes: Any) -> dict:
    curve = [
        {"step": n, "seen_examples": 32 * n, "loss": one, "punish": 2 * one, "reward": 3 * one,
         "induction_heads": 4.0, "A": 0.5}
        for n, one in enumerate(losses, 1)
    ]  # fmt: skip
    return cell(method, seed=seed, run=run(curve=curve), **changes)


class TestTraining:
    def test_means_over_seeds_as_far_as_all_went(self) -> None:
        cells = [trained("abft", [4.0, 2.0], 1), trained("abft", [2.0, 1.0, 0.5], 2),
                 trained("no_pid", [1.0], 1),
                 trained("abft", [9.0], 1, sweep={"a.b": 1})]  # fmt: skip
        ((plot, ax),) = drawn(cells, "training")
        found = by_label(ax)
        assert curves(found["loss"]) == {"abft": ([32, 64], [3, 1.5]), "no_pid": ([32], [1])}
        assert curves(found["punish term (attention)"])["abft"][1] == [6, 3]
        band = found["loss"].collections[0].get_paths()[0].vertices
        at = band[np.isclose(band[:, 0], 64)][:, 1]
        assert (at.min(), at.max()) == pytest.approx((1.5 - 0.5**0.5, 1.5 + 0.5**0.5))
        assert plot.stem == "training-demo"
        assert "2 training seeds; bands are one standard deviation" in plot.caption

    def test_end_to_end_shows_its_loss_alone(self) -> None:
        cells = [trained("abft", [4.0], 1), trained("end_to_end", [1.0], 1, kind="end_to_end")]
        ((plot, ax),) = drawn(cells, "training")
        found = by_label(ax)
        assert [*curves(found["loss"])] == ["end_to_end", "abft"]
        assert [*curves(found["induction heads in a prompt"])] == ["abft"]
        assert "cross-entropy" in plot.caption

    def test_of_many_settings_the_first_eight(self) -> None:
        cells = [trained("abft", [1.0], 1, sweep={"objective.punish": n}) for n in range(9)]
        ((plot, ax),) = drawn(cells, "training")
        assert len(by_label(ax)["loss"].lines) == 8
        assert "the first 8 of 9 settings" in plot.caption


class TestAnswers:
    @staticmethod
    def measured(counts: list[list[int]], confident: float = 0.95, **more: Any) -> dict:
        values = {**summary(answers(0.5, 8)), **evaluated(counts, confident)}
        return {"methods": {"vanilla": values}, **more}

    def test_confusion_is_summed_over_seeds(self) -> None:
        cells = [cell("untrained", evaluation=self.measured([[1, 1], [1, 1]]))]
        cells += [
            cell("abft", seed=seed, evaluation=self.measured(counts, labels=["ham", "spam"]))
            for seed, counts in ((1, [[3, 1], [0, 4]]), (2, [[2, 2], [1, 3]]))
        ]
        cells.append(cell("no_pid", seed=1, evaluation=self.measured([[0, 4], [4, 0]])))
        ((plot, ax),) = drawn(cells, "confusion")
        before, after = ax
        assert (before.get_title(), after.get_title()) == ("vanilla", "abft")
        found = {one.get_position(): one.get_text() for one in after.texts}
        assert found == {(0, 0): "5", (1, 0): "3", (0, 1): "1", (1, 1): "7"}
        np.testing.assert_allclose(
            np.asarray(after.images[0].get_array()), [[62.5, 37.5], [12.5, 87.5]]
        )
        assert ticks(before.yaxis) == ["ham", "spam"]
        assert plot.stem == "confusion-demo-sst2"
        assert "counts are summed over seeds" in plot.caption

    def test_a_figure_for_each_task(self) -> None:
        cells = [
            cell("abft", seed=1, task=task, evaluation=self.measured([[1, 0], [0, 1]]))
            for task in ("sst2", "trec")
        ]
        assert [one.stem for one, _ in drawn(cells, "confusion")] == [
            "confusion-demo-sst2", "confusion-demo-trec",
        ]  # fmt: skip

    def test_reliability_is_pooled_over_seeds(self) -> None:
        cells = [
            cell("abft", seed=seed, evaluation=self.measured(counts, confident))
            for seed, counts, confident in (
                (1, [[3, 1], [0, 4]], 0.9),
                (2, [[10, 6], [2, 6]], 1.0),
            )
        ]
        ((plot, ax),) = drawn(cells, "reliability")
        upper, lower = ax
        # 8 prompts of the first seed, 24 of the second.
        confidence, accuracy = curves(upper)["abft"]
        assert confidence == [pytest.approx(100 * (8 * 0.9 + 24 * 1.0) / 32)]
        assert accuracy == [pytest.approx(100 * (7 + 16) / 32)]
        assert [bar.get_height() for bar in lower.containers[0]] == [0] * 9 + [32]
        assert plot.stem == "reliability-demo-sst2"

    def test_cells_without_bins_are_told(self) -> None:
        note = missing([cell("abft", answers(0.5, 8), seed=1)], "reliability")
        assert "made before eval kept the bins" in note


class TestInterpolation:
    @staticmethod
    def plane(seed: int, more: float, factors: list[float]) -> dict:
        size = len(factors)
        table = (np.arange(size * size).reshape(size, size) / 100 + more).tolist()
        part = {"axes": ["abft", "end_to_end"], "factors": factors, "prompts": 40,
                "accuracy": table}  # fmt: skip
        return cell("plane", seed=seed, plane=part, run=None)

    def test_the_line_between_two_methods_out_of_their_plane(self) -> None:
        factors = [-0.25, 0.0, 0.5, 1.0]
        ((plot, (ax,)),) = drawn([self.plane(1, 0.0, factors), self.plane(2, 0.1, factors)],
                              "interpolation")  # fmt: skip
        # First method's factor is the row: (1, 0), (0.5, 0.5), (0, 1); -0.25 has no partner.
        want = [100 * (value / 100 + 0.05) for value in (13, 10, 7)]
        assert curves(ax)["between the two"] == ([0, 0.5, 1], pytest.approx(want))
        assert curves(ax)["abft"] == ([0], [pytest.approx(want[0])])
        assert curves(ax)["base"][1] == [pytest.approx(10)] * 2
        assert plot.stem == "interpolation-demo-sst2-abft-end_to_end"
        assert "n = 40 prompts; 2 training seeds" in plot.caption

    def test_a_grid_that_does_not_hold_the_line(self) -> None:
        note = missing([self.plane(1, 0.0, [0.0, 1.0])], "interpolation")
        assert "no cell that is done measured what it shows" in note


class TestFromCells:
    def test_accuracy(self) -> None:
        cells = [cell("untrained", {"vanilla": answers(0.5, 40)}, model="GPT2-L")]
        cells += [
            cell("abft", answers(rate, 40), seed=seed, model="GPT2-L")
            for seed, rate in ((1, 0.7), (2, 0.8))
        ]
        cells.append(cell("abft", answers(0.1, 40), seed=1, model="GPT2-L", sweep={"a.b": 1}))
        ((one, (ax,)),) = drawn(cells, "accuracy", paper={"table": "table1"})
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
        ((_, (ax,)),) = drawn(cells, "consistency", paper={"table": "table3"})
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
        ((_, (ax,)),) = drawn([one], "unseen")
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
        ((one, (ax,)),) = drawn(cells, "data_efficiency")
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
        ((_, (ax,)),) = drawn(cells, "head_count")
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
        first, second = (ax.images[0] for _, (ax,) in made)
        np.testing.assert_allclose(first.get_array(), [[50, 60], [70, 80]])
        np.testing.assert_allclose(second.get_array(), [[10, 20], [30, 40]])
        assert first.get_clim() == second.get_clim() == pytest.approx((10, 80))

    def test_plane_averages_seeds(self) -> None:
        def made(seed: int, more: float) -> dict:
            values = [[0.5 + more, 0.6 + more], [0.8 + more, 0.7 + more]]
            part = {"axes": ["abft", "end_to_end"], "factors": [0.0, 1.0], "prompts": 40,
                    "accuracy": values}  # fmt: skip
            return cell("plane", seed=seed, plane=part, run=None, model="GPT2-XL")

        ((one, (ax,)),) = drawn([made(1, 0.0), made(2, 0.1)], "plane")
        assert curves(ax)["abft (85.0; paper 84)"] == ([1], [0])
        assert "n = 40 prompts; 2 training seeds" in one.caption

    def test_extrapolation(self) -> None:
        part = {
            "factors": [1.0, 2.0], "chosen": 2.0,
            "validation": {"prompts": 16, "accuracy": [0.5, 0.6]},
            "test": {"prompts": 40, "accuracy": [0.4, 0.45]},
        }  # fmt: skip
        ((one, (ax,)),) = drawn([cell("extrapolate", seed=1, extrapolation=part)], "extrapolation")
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
        ((_, (ax,)),) = drawn(cells, "label_attention")
        found = curves(ax)
        assert found["before, all labels"][1] == pytest.approx([0.3, 0.6])
        assert found["abft, gold label"][1] == pytest.approx([0.2, 0.5])
        ((_, (ax,)),) = drawn(cells, "shift")
        assert curves(ax)["abft W_Q"][1] == pytest.approx([0.2, 0.5])
        assert curves(ax)["abft W_K"][1] == pytest.approx([0.2, 0.4])


class TestFiles:
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
