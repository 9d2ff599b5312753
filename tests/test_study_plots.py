"""Figures of a study beside those that the paper has: training, answers, interpolation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from figure_support import axes, ticks
from made_cells import answers, cell, run, study, summary
from made_heads import evaluated

from abft_mlx.analysis.facts import facts
from abft_mlx.analysis.plots import plots


def drawn(cells: list[dict], name: str) -> list[tuple[Any, Any]]:
    """Each plot of a figure, and the Axes that it drew on."""
    made, notes = plots(facts(study(figures=[name]), cells))
    assert not notes
    return [(one, one.draw(axes())) for one in made]


def curves(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        one.get_label(): ([*map(float, one.get_xdata())], [*map(float, one.get_ydata())])
        for one in ax.lines
    }


def panels(ax: Any) -> dict[str, Any]:
    return {one.get_ylabel().replace("\n", " "): one for one in ax.child_axes}


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
        found = panels(ax)
        assert curves(found["loss"]) == {"abft": ([32, 64], [3, 1.5]), "no_pid": ([32], [1])}
        assert curves(found["punish term (attention)"])["abft"][1] == [6, 3]
        band = found["loss"].collections[0].get_paths()[0].vertices
        at = band[np.isclose(band[:, 0], 64)][:, 1]
        assert (at.min(), at.max()) == pytest.approx((1.5 - 0.5**0.5, 1.5 + 0.5**0.5))
        assert plot.stem == "training-demo"
        assert "2 training seeds; bands are one standard deviation" in plot.caption
        assert plot.height is not None
        assert plot.height(6.4) > 3

    def test_end_to_end_shows_its_loss_alone(self) -> None:
        cells = [trained("abft", [4.0], 1), trained("end_to_end", [1.0], 1, kind="end_to_end")]
        ((plot, ax),) = drawn(cells, "training")
        found = panels(ax)
        assert [*curves(found["loss"])] == ["end_to_end", "abft"]
        assert [*curves(found["induction heads in a prompt"])] == ["abft"]
        assert "cross-entropy" in plot.caption

    def test_of_many_settings_the_first_eight(self) -> None:
        cells = [trained("abft", [1.0], 1, sweep={"objective.punish": n}) for n in range(9)]
        ((plot, ax),) = drawn(cells, "training")
        assert len(panels(ax)["loss"].lines) == 8
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
        before, after = ax.child_axes
        assert (before.get_title(), after.get_title()) == ("vanilla", "abft")
        found = {one.get_position(): one.get_text() for one in after.texts}
        assert found == {(0, 0): "5", (1, 0): "3", (0, 1): "1", (1, 1): "7"}
        np.testing.assert_allclose(
            np.asarray(after.images[0].get_array()), [[62.5, 37.5], [12.5, 87.5]]
        )
        assert [text for _, text in ticks(before.yaxis)] == ["ham", "spam"]
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
        upper, lower = ax.child_axes
        # 8 prompts of the first seed, 24 of the second.
        confidence, accuracy = curves(upper)["abft"]
        assert confidence == [pytest.approx(100 * (8 * 0.9 + 24 * 1.0) / 32)]
        assert accuracy == [pytest.approx(100 * (7 + 16) / 32)]
        assert [bar.get_height() for bar in lower.containers[0]] == [0] * 9 + [32]
        assert plot.stem == "reliability-demo-sst2"

    def test_cells_without_bins_are_told(self) -> None:
        document = facts(study(figures=["reliability"]), [cell("abft", answers(0.5, 8), seed=1)])
        made, (note,) = plots(document)
        assert made == []
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
        ((plot, ax),) = drawn([self.plane(1, 0.0, factors), self.plane(2, 0.1, factors)],
                              "interpolation")  # fmt: skip
        # First method's factor is the row: (1, 0), (0.5, 0.5), (0, 1); -0.25 has no partner.
        want = [100 * (value / 100 + 0.05) for value in (13, 10, 7)]
        assert curves(ax)["between the two"] == ([0, 0.5, 1], pytest.approx(want))
        assert curves(ax)["abft"] == ([0], [pytest.approx(want[0])])
        assert curves(ax)["base"][1] == [pytest.approx(10)] * 2
        assert plot.stem == "interpolation-demo-sst2-abft-end_to_end"
        assert "n = 40 prompts; 2 training seeds" in plot.caption

    def test_a_grid_that_does_not_hold_the_line(self) -> None:
        made, (note,) = plots(
            facts(study(figures=["interpolation"]), [self.plane(1, 0.0, [0.0, 1.0])])
        )
        assert made == []
        assert "no cell that is done measured what it shows" in note
