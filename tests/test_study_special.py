"""Cells between and beyond the weights: plane and extrapolate; cells that train on other tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_support import text

from abft_mlx import adapters, experiment, study
from abft_mlx.errors import RunError
from abft_mlx.study.running import _MEASURES, _best, _check_splits

FEW = "training.learning_rate=0.05, objective.filter=false, training.validation_prompts=8"


def one_task(methods: str, more: str = "") -> study.Study:
    return study.loads(
        text(methods, more)
        .replace(", generated/purpose", "")
        .replace("settings: [", f"settings: [{FEW}, ")
    )


def done(opened: study.Study, folder: Path) -> dict[str, dict[str, Any]]:
    outcome = study.run(opened, folder)
    assert outcome.failed == {}
    return {cell["method"]: cell for cell in study.read(folder)}


def test_a_planes_corners_are_base_and_methods(tmp_path: Path) -> None:
    plane = "{like: plane, axes: [abft, end_to_end], factors: [0, 1]}"
    cells = done(one_task(f"[vanilla, abft, end_to_end, {plane}]"), tmp_path / "s")
    found = cells["plane"]["plane"]
    assert (found["axes"], found["factors"]) == (["abft", "end_to_end"], [0.0, 1.0])
    assert found["prompts"] == 8
    corners = {"untrained": (0, 0), "abft": (1, 0), "end_to_end": (0, 1)}
    measured = {}
    for name, (row, column) in corners.items():
        method = cells[name]["evaluation"]["methods"]["vanilla"]
        for measure in ("accuracy", "macro_f1", "true_label_probability"):
            assert found[measure][row][column] == pytest.approx(method[measure], abs=1e-5)
        assert found["right"][row][column] == method["right"]
        measured[name] = method["true_label_probability"]
    assert len({round(value, 4) for value in measured.values()}) == 3
    assert cells["plane"]["run"] is None
    assert cells["plane"]["factors"] == [0.0, 1.0]
    for name in ("abft", "end_to_end"):
        ours, alone = found["runs"][name], cells[name]["run"]
        assert [one["loss"] for one in ours["curve"]] == [one["loss"] for one in alone["curve"]]
        assert cells["plane"]["axes"][name] == cells[name]["recipe"]


def test_an_extrapolation_is_chosen_on_validation(tmp_path: Path) -> None:
    far = "{name: far, like: extrapolate, factors: [0, 1, 2]}"
    rows = "{name: rows, like: abft, settings: [data.training_rows=768, data.validation_rows=256]}"
    cells = done(one_task(f"[vanilla, {rows}, {far}]"), tmp_path / "s")
    cell, found = cells["far"], cells["far"]["extrapolation"]
    assert found["factors"] == [0.0, 1.0, 2.0]
    assert (found["validation"]["prompts"], found["test"]["prompts"]) == (8, 8)
    best = max(found["validation"]["accuracy"])
    assert found["validation"]["accuracy"][found["factors"].index(found["chosen"])] == best
    for factor, method in {
        0: cells["untrained"]["evaluation"],
        1: cells["rows"]["evaluation"],
        found["chosen"]: cell["evaluation"],
    }.items():
        position = found["factors"].index(factor)
        for measure in ("accuracy", "true_label_probability"):
            expected = method["methods"]["vanilla"][measure]
            assert found["test"][measure][position] == pytest.approx(expected, abs=1e-5)
    assert (
        found["unscaled"]["methods"]["vanilla"]["right"]
        == (cells["rows"]["evaluation"]["methods"]["vanilla"]["right"])
    )
    assert len(set(found["test"]["true_label_probability"])) == 3
    norms = [sum(cells[name]["shift"]["q"]) for name in ("rows", "far")]
    assert norms[1] == pytest.approx(found["chosen"] * norms[0], rel=1e-4)


def test_test_prompts_have_no_say_in_the_factor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[float] = []

    whole = adapters.combine

    def combine(model: Any, strengths: Any) -> None:
        factors.append(strengths[0][1])
        whole(model, strengths)

    def measure(_: Any, chosen: list[Any], __: Any) -> dict[str, float]:
        accuracy = {6: {0: 0.5, 1: 0.6, 2: 0.7}, 8: {0: 0.9, 1: 0.8, 2: 0.1}}
        rest = dict.fromkeys(_MEASURES, 0.5)
        return {**rest, "accuracy": accuracy[len(chosen)][factors[-1]]}

    monkeypatch.setattr(experiment.Experiment, "measure", measure)
    monkeypatch.setattr(adapters, "combine", combine)
    opened = one_task(
        "[{like: extrapolate, factors: [0, 1, 2], settings: [training.validation_prompts=6]}]"
    )
    outcome = study.run(opened, tmp_path / "s")
    assert outcome.failed == {}
    (cell,) = study.read(tmp_path / "s")
    found = cell["extrapolation"]
    assert found["validation"]["accuracy"] == [0.5, 0.6, 0.7]
    assert found["test"]["accuracy"] == [0.9, 0.8, 0.1]
    assert found["chosen"] == 2
    assert factors == [0, 1, 2, 0, 1, 2, 1, 2]


def test_the_factor_nearest_to_one_wins_a_tie() -> None:
    factors = [0.0, 0.5, 1.25, 2.0]
    assert _best(factors, [0.7, 0.8, 0.8, 0.8]) == 1.25
    assert _best(factors, [0.7, 0.8, 0.8, 0.9]) == 2.0
    assert _best(factors, [0.9, 0.8, 0.8, 0.9]) == 0.0


def test_a_set_too_small_to_carve_is_an_error() -> None:
    few = ["data.training_rows=3001", "data.demonstration_rows=100", "data.test_rows=3000"]
    (cell,) = study.cells(
        study.loads(
            "models: [demo]\ntasks: [demo]\nmethods: [extrapolate]\n"
            f"settings: [{', '.join(few)}, training.examples=4]"
        )
    )
    with pytest.raises(RunError, match="too few rows") as caught:
        _check_splits(experiment.prepare(cell.recipe))
    assert "6000" in str(caught.value)


def test_a_mixture_trains_on_the_other_tasks(tmp_path: Path) -> None:
    opened = study.loads(text("[abft, abft_mixture]", "protocols: [accuracy, transfer]"))
    outcome = study.run(opened, tmp_path / "s")
    assert outcome.failed == {}
    cells = {(cell["task"], cell["method"]): cell for cell in study.read(tmp_path / "s")}
    for task, other in (
        ("generated/emotion", "generated/purpose"),
        ("generated/purpose", "generated/emotion"),
    ):
        mixed, alone = cells[task, "abft_mixture"], cells[other, "abft"]
        assert [one["loss"] for one in mixed["run"]["curve"]] == [
            one["loss"] for one in alone["run"]["curve"]
        ]
        assert list(mixed["evaluation"]["transfer"])
        assert other in str(mixed["evaluation"]["transfer"])
