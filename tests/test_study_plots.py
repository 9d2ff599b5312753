"""Figures of a study, from made-up cells: the numbers that are drawn, read back from the Axes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_support import band, bars, by_label, curves, drawn
from made_cells import answers, cell, consistency, curve, run, study, summary

from abft_mlx import analysis
from abft_mlx.analysis.study_data import Facts, facts
from abft_mlx.analysis.study_plots import study_plots
from abft_mlx.errors import RecipeError


def plots(cells: list[dict], name: str) -> list[tuple[Any, list[Any]]]:
    """Each plot of a study's figure, and the Axes that it drew on."""
    document = Facts.model_validate(facts(study(), cells))
    return [(plot, drawn(plot.draw)) for plot in study_plots(document, name)]


def trained(method: str, losses: list[float], seed: int, **changes: Any) -> dict:
    steps = [{**step, "loss": loss, "punish": 2 * loss, "reward": 3 * loss}
             for step, loss in zip(curve([4.0] * len(losses)), losses, strict=True)]  # fmt: skip
    return cell(method, seed=seed, run=run(curve=steps), **changes)


def test_training_means_over_seeds_as_far_as_all_went() -> None:
    cells = [trained("abft", [4.0, 2.0], 1), trained("abft", [2.0, 1.0, 0.5], 2),
             trained("no_pid", [1.0], 1), trained("end_to_end", [1.0], 1, kind="end_to_end"),
             trained("abft", [9.0], 1, sweep={"a.b": 1})]  # fmt: skip
    ((plot, axes),) = plots(cells, "training")
    panels = by_label(axes)
    assert curves(panels["loss"]) == {
        "abft": ([32, 64], [3, 1.5]), "no_pid": ([32], [1]), "end_to_end": ([32], [1]),
    }  # fmt: skip
    assert curves(panels["punish term (attention)"])["abft"][1] == [6, 3]
    assert {*curves(panels["induction heads in a prompt"])} == {"abft", "no_pid"}
    around = band(panels["loss"], 1, 64)
    assert around == pytest.approx((1.5 - 0.5**0.5, 1.5 + 0.5**0.5))
    assert plot.stem == "training-demo"
    assert "2 training seeds; bands are one standard deviation" in plot.caption
    assert "cross-entropy" in plot.caption
    ((plot, (axes,)),) = plots(cells, "head_count")
    assert plot.stem == "head-count-demo"
    assert curves(axes) == {"abft": ([32, 64], [4, 4]), "no_pid": ([32], [4])}


def test_of_many_settings_the_first_eight() -> None:
    cells = [trained("abft", [1.0], 1, sweep={"objective.punish": n}) for n in range(9)]
    ((plot, axes),) = plots(cells, "training")
    assert len(by_label(axes)["loss"].lines) == 8
    assert "the first 8 of 9 settings" in plot.caption


def test_accuracy_and_consistency() -> None:
    cells = [cell("untrained", {"vanilla": answers(0.5, 40)},
                  evaluation={"robustness": consistency(0.8, 0.6)})]  # fmt: skip
    cells += [cell("abft", answers(rate, 40), seed=n) for n, rate in ((1, 0.7), (2, 0.8))]
    cells.append(cell("abft", answers(0.1, 40), seed=1, sweep={"a.b": 1}))
    cells[0]["evaluation"]["methods"] = {"vanilla": summary(answers(0.5, 40))}
    ((plot, (axes,)),) = plots(cells, "accuracy")
    assert bars(axes) == {"vanilla": [50], "abft": [pytest.approx(75)]}
    assert plot.stem == "accuracy-demo"
    assert plot.caption == "demo; sst2; n = 40 prompts; 2 training seeds"
    ((_, (axes,)),) = plots(cells, "consistency")
    assert bars(axes)["vanilla"] == pytest.approx([80, 60])


def test_unseen() -> None:
    rates = (("random", 0.5), ("unseen", 0.25), ("zero_shot", 0.75))
    parts = {kind: summary(answers(rate, 40)) for kind, rate in rates}
    ((_, (axes,)),) = plots([cell("untrained", evaluation={"unseen": parts})], "unseen")
    assert bars(axes)["vanilla"] == [50, 25]
    assert curves(axes)["vanilla, zero-shot"][1] == [75, 75]


def test_data_efficiency() -> None:
    cells = [cell("untrained", {"vanilla": answers(0.5, 40)})]
    cells += [
        cell("abft", answers(rate, 40), seed=1, sweep={"training.examples": size})
        for size, rate in ((64, 0.7), (32, 0.6))
    ]
    ((plot, (axes,)),) = plots(cells, "data_efficiency")
    assert curves(axes)["abft"] == ([32, 64], pytest.approx([60, 70]))
    assert curves(axes)["vanilla"][1] == [50, 50]
    low, high = band(axes, 0, 32)
    assert low < 60 < high
    assert "95% intervals" in plot.caption


def test_grid() -> None:
    rates = {(0, 1): 0.5, (0, 2): 0.6, (0.5, 1): 0.7, (0.5, 2): 0.8}
    cells = [
        cell(method, answers(rate - less, 40), seed=1,
             sweep={"objective.punish": a, "objective.reward": b})
        for method, less in (("abft", 0), ("no_pid", 0.4))
        for (a, b), rate in rates.items()
    ]  # fmt: skip
    made = plots(cells, "grid")
    assert [plot.stem for plot, _ in made] == ["grid-demo-abft", "grid-demo-no_pid"]
    first, second = (axes.images[0] for _, (axes,) in made)
    np.testing.assert_allclose(first.get_array(), [[50, 60], [70, 80]])
    np.testing.assert_allclose(second.get_array(), [[10, 20], [30, 40]])
    assert first.get_clim() == second.get_clim() == pytest.approx((10, 80))


def test_plane_averages_seeds() -> None:
    def made(seed: int, more: float) -> dict:
        values = [[0.5 + more, 0.6 + more], [0.8 + more, 0.7 + more]]
        part = {"axes": ["abft", "end_to_end"], "factors": [0.0, 1.0], "prompts": 40,
                "accuracy": values}  # fmt: skip
        return cell("plane", seed=seed, plane=part, run=None)

    ((plot, (axes,)),) = plots([made(1, 0.0), made(2, 0.1)], "plane")
    assert curves(axes)["abft (85.0)"] == ([1], [0])
    assert plot.stem == "plane-demo-sst2-abft-end_to_end"
    assert "n = 40 prompts; 2 training seeds" in plot.caption


def test_extrapolation() -> None:
    part = {
        "factors": [1.0, 2.0], "chosen": 2.0,
        "validation": {"prompts": 16, "accuracy": [0.5, 0.6]},
        "test": {"prompts": 40, "accuracy": [0.4, 0.45]},
    }  # fmt: skip
    ((plot, (axes,)),) = plots([cell("extrapolate", seed=1, extrapolation=part)], "extrapolation")
    assert curves(axes)["test"] == ([1, 2], [40, 45])
    assert curves(axes)["chosen on validation"][0] == [2]
    assert "n = 40 test and 16 validation prompts" in plot.caption


def test_layers() -> None:
    census = {"prompts": 8, "magnitude": [[0.2, 0.4], [0.6, None]],
              "correctness": [[0.0, 0.2], [0.4, None]]}  # fmt: skip
    cells = [
        cell("untrained", census=census),
        *(
            cell("abft", seed=seed, census=census, shift={"q": [q, 0.5], "k": [0.2, 0.4]})
            for seed, q in ((1, 0.1), (2, 0.3))
        ),
    ]
    ((_, (axes,)),) = plots(cells, "label_attention")
    assert curves(axes)["before, all labels"][1] == pytest.approx([0.3, 0.6])
    assert curves(axes)["abft, gold label"][1] == pytest.approx([0.2, 0.5])
    ((_, (axes,)),) = plots(cells, "shift")
    assert curves(axes)["abft W_Q"][1] == pytest.approx([0.2, 0.5])
    assert curves(axes)["abft W_K"][1] == pytest.approx([0.2, 0.4])


def test_every_figure_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = study(figures=list(analysis.STUDY_FIGURES))
    made = analysis.write_study(tmp_path, named, [])
    assert [path.name for path in made] == ["table.md", "table.csv", "study.json"]
    (note,) = made.notes
    assert note.startswith("accuracy, data_efficiency, ")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cells = [cell("abft", answers(0.5, 40), seed=1)]
    made = analysis.write_study(tmp_path, study(figures=["accuracy"]), cells)
    assert len(made) == 3
    assert "pip install 'abft-mlx[plots]'" in made.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"figures": ["pie"]}, "no figure is called pie; there are accuracy,"),
        ({"paper": {"table": "table9"}}, "paper has table: table9; write table: and one of"),
    ],
)
def test_what_does_not_exist_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        analysis.write_study(tmp_path / "out", study(**changes), [])
    assert not (tmp_path / "out").exists()
