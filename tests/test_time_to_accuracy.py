"""Accuracy against seconds: the arithmetic by hand, the contenders against each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
import yaml
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss

from abft_mlx.errors import OutputError

TASK = "generated/urgency"
SMALL = (
    "training.examples=16",
    "training.prompts_per_update=8",
    "evaluation.queries=8",
    "evaluation.repeats=1",
)


@pytest.fixture(scope="module")
def script(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("time_to_accuracy")


@pytest.fixture(scope="module")
def summary(script: ModuleType) -> ModuleType:
    return script.summary


@pytest.fixture(scope="module")
def contenders(script: ModuleType) -> ModuleType:
    return script.contenders


def one(seconds: list[float], accuracy: dict[int, float], setup: float = 0.0) -> dict[str, Any]:
    warm = [True] + [False] * (len(seconds) - 1)
    return {
        "seconds": seconds,
        "warming_up": warm,
        "setup_seconds": setup,
        "accuracy": {str(n): value for n, value in accuracy.items()},
    }


def cell(task: str, seed: int, up: float = 0.0) -> dict[str, Any]:
    """exact takes 2 s an update and ends at 0.6 + up; quick takes 1 s and ends, after 3, at 0.5."""
    return {
        "task": task,
        "seed": seed,
        "settings": {"base": "demo", "updates": 2, "queries": 8, "contenders": ["exact", "quick"]},
        "contenders": {
            "exact": one([7.0, 2.0], {0: 0.4, 1: 0.5, 2: 0.6 + up}, setup=0.25),
            "quick": one([1.0, 1.0, 1.0], {0: 0.4, 1: 0.42, 2: 0.46, 3: 0.5}),
        },
    }


def test_warming_up_is_told_apart(summary: ModuleType) -> None:
    assert summary.steady([9.0, 1.0, 3.0, 2.0], [True, False, False, False]).tolist() == [
        2,
        1,
        3,
        2,
    ]
    assert summary.steady([9.0], [True]).tolist() == [9.0]
    assert summary.warm_up_seconds(one([9.0, 1.0, 3.0, 2.0], {}, setup=0.5)) == 7.5
    found = summary.curve(one([9.0, 1.0, 3.0, 2.0], {0: 0.1, 2: 0.2, 4: 0.3}))
    assert found.seconds.tolist() == [0, 3, 8]


def test_a_curve_is_linear_between_measurements_and_level_behind_them(summary: ModuleType) -> None:
    found = summary.Curve(
        np.array([0, 2, 4]), np.array([0.0, 4.0, 10.0]), np.array([0.3, 0.5, 0.8])
    )
    assert found.at(3.0) == (pytest.approx(0.45), False)
    assert found.at(10.0) == (0.8, False)
    assert found.at(10.5) == (0.8, True)
    assert found.after(2) == 0.5
    assert found.time_to(0.6) == pytest.approx(6.0)
    assert found.time_to(0.5) == 4.0
    assert found.time_to(0.2) == 0.0
    assert found.time_to(0.9) is None


def test_means_are_over_what_every_cell_measured(summary: ModuleType) -> None:
    first = summary.Curve(np.array([0, 2, 3]), np.array([0.0, 2.0, 3.0]), np.array([0.2, 0.4, 0.9]))
    second = summary.Curve(
        np.array([0, 2, 5]), np.array([0.0, 4.0, 9.0]), np.array([0.4, 0.5, 0.9])
    )
    mean = summary.mean_curve([first, second])
    assert mean.updates.tolist() == [0, 2]
    assert mean.seconds.tolist() == [0, 3]
    assert mean.accuracy.tolist() == pytest.approx([0.3, 0.45])


def test_the_summary_is_what_comes_out_by_hand(summary: ModuleType) -> None:
    cells = [cell("a", 1), cell("a", 2, up=0.2), cell("b", 1), cell("b", 2)]
    exact, quick = summary.lines(cells, [1, 2])
    assert (exact.update_seconds, quick.update_seconds) == (2.0, 1.0)
    assert (exact.warm_up_seconds, quick.warm_up_seconds) == (5.25, 0.0)
    assert [at.mean for at in exact.at_updates] == pytest.approx([0.5, 0.65])
    assert [at.mean for at in quick.at_updates] == pytest.approx([0.42, 0.46])
    # After 2 s, quick has made two updates; after 4 s it had ended.
    assert [at.mean for at in quick.at_seconds] == pytest.approx([0.46, 0.5])
    assert [at.mean for at in quick.against] == pytest.approx([-0.04, -0.15])
    assert quick.ended == [False, True]
    assert exact.ended == [False, False]
    # Task b's runs are alike and task a's end at 0.6 and 0.8, so its mean lies between these.
    last = exact.at_updates[1]
    assert (last.low, last.high) == pytest.approx(((0.6 + 0.6) / 2, (0.8 + 0.6) / 2))
    # exact ends at 0.65, and is at 0.64 after 0.14 / 0.15 of its second update.
    assert exact.seconds_to_target == pytest.approx(2 + 2 * 0.14 / 0.15)
    assert quick.seconds_to_target is None
    text = summary.markdown(cells, [1, 2])
    assert "| exact | 2.000 | 1.00 × | 5.25 | 50.0 [50.0, 50.0] | 65.0 [60.0, 70.0] |" in text
    assert "50.0 [50.0, 50.0]† | -15.0 [-20.0, -10.0]† | – | – |" in text
    assert "2 tasks; n = 8 prompts a task; 2 training seeds" in text


def test_the_figure_is_drawn_with_a_line_for_each(summary: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib to draw")
    written = summary.figure(tmp_path / "curve", [cell("a", 1), cell("b", 1)])
    assert {path.suffix for path in written} == {".svg", ".png"}
    drawn = (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert all(f">{word}<" in drawn for word in ("exact", "quick", "untrained"))
    assert "2 tasks; n = 8 prompts a task; 1 training seed" in drawn


def parsed(script: ModuleType, folder: Path, *more: str) -> Any:
    given = ["--output", str(folder), "--contenders", "exact", "--updates", "2", "--queries", "8"]
    return script.arguments([*given, *more])


def test_cells_that_lie_there_are_not_done_again(script: ModuleType, tmp_path: Path) -> None:
    done: list[tuple[str, int]] = []

    def make(task: str, seed: int, chosen: Any) -> dict[str, Any]:
        done.append((task, seed))
        return {**cell(task, seed), "settings": script.settings(chosen)}

    some = ["--tasks", TASK, "generated/emotion", "--seeds"]
    assert script.run(parsed(script, tmp_path, *some, "1"), make) == 2
    assert script.run(parsed(script, tmp_path, *some, "1", "2"), make) == 2
    assert done == [(task, seed) for seed in (1, 2) for task in (TASK, "generated/emotion")]
    assert len(script.collected(tmp_path)) == 4
    with pytest.raises(OutputError, match=r"updates 2, not 3; choose another --output"):
        script.run(parsed(script, tmp_path, *some, "1", "--updates", "3"), make)
    other = tmp_path / "other-1.json"
    other.write_text(json.dumps({"settings": {"updates": 5}}), encoding="utf-8")
    with pytest.raises(OutputError, match=r"other-1\.json: was made with|was made with \w+ None"):
        script.collected(tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--contenders", "exakt"], "contender 'exakt' is not known; there are exact, local"),
        (["--updates", "0"], "--updates 0: give at least 1"),
        (["--output", __file__], "cannot be written (File exists); choose another folder"),
        (["--summary"], "holds no cells; run without --summary first"),
    ],
)
def test_a_wrong_use_is_one_line(
    script: ModuleType, tmp_path: Path, capsys: Any, given: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        script.main(["--output", str(tmp_path), "--contenders", "exact", *given])
    assert raised.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_the_modes_are_those_of_the_study(contenders: ModuleType, checkout: Path) -> None:
    study = yaml.safe_load((checkout / "recipes/studies/modes.yaml").read_text(encoding="utf-8"))
    named = [method for method in study["methods"] if isinstance(method, dict)]
    assert {one["name"] for one in named} == {"local", "shared", "local_shared"}
    for method in named:
        assert contenders.OURS[method["name"]] == tuple(method["settings"])


def test_faster_contenders_train_on_to_the_references_time(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a clock that says 4 s for each of exact's updates and 1 for each of the other's."""
    made = script.contenders.make

    def timed(name: str, task: str, given: list[str]) -> Any:
        found = made(name, task, given)
        update = found.update

        def slowly() -> None:
            update()
            found.seconds[-1] = 4.0 if name == "exact" else 1.0

        found.update = slowly
        return found

    monkeypatch.setattr(script.contenders, "make", timed)
    small = [f"--set={one}" for one in SMALL[:2]]
    chosen = parsed(script, tmp_path, "--contenders", "exact", "local_shared", *small)
    found = script.cell(TASK, 1, chosen)
    quick = found["contenders"]["local_shared"]
    assert len(found["contenders"]["exact"]["seconds"]) == 2
    assert quick["seconds"] == [1.0] * 8
    assert list(quick["accuracy"]) == ["0", "2", "4", "8"]
    assert np.isfinite(quick["losses"]).all()
    json.dumps(found, allow_nan=False)


def test_taking_turns_changes_nothing(contenders: ModuleType) -> None:
    """Adapters of two that train in turns, measured in between, are those of one that runs."""
    settings = [*SMALL, "training.updates=3", "adapter.dropout=0.2"]
    pair = [contenders.make("exact", TASK, settings) for _ in range(2)]
    for _ in range(3):
        for each in pair:
            each.update()
            each.accuracy(each.opened.test_prompts())
    alone = contenders.make("exact", TASK, settings)
    alone.trainer.run()
    expected = dict(tree_flatten(alone.trainer.model.trainable_parameters()))
    assert any(mx.abs(value).max() > 0 for name, value in expected.items() if "lora_b" in name)
    for each in pair:
        for name, value in tree_flatten(each.trainer.model.trainable_parameters()):
            assert mx.array_equal(value, expected[name]), name


def test_the_papers_way_is_our_exact_step_in_full(contenders: ModuleType) -> None:
    """Losses of four updates, A steered in the last; then the weights that were copied back."""
    tiny_models.torch()
    pytest.importorskip("transformers", reason="needs transformers to compare with")
    settings = [*SMALL, "training.updates=4", "objective.cp=0.5"]
    ours = contenders.make("full", TASK, settings)
    theirs = contenders.make("pytorch-paper", TASK, settings)
    for _ in range(4):
        ours.update()
        theirs.update()
    assert theirs.losses == pytest.approx(ours.losses, abs=1e-4)
    steered = theirs.controller.punish_weight
    assert steered == pytest.approx(ours.trainer.controller.punish_weight, abs=1e-6)
    assert abs(steered - 0.5) > 1e-3
    test = ours.opened.test_prompts()
    assert theirs.accuracy(test) == ours.accuracy(test)
    trained = dict(tree_flatten(ours.opened.loaded.model.parameters()))
    copied = dict(tree_flatten(theirs.opened.loaded.model.parameters()))
    for name in theirs.names:
        # A mean: where a gradient is nearly 0, Adam makes a step of its rounding's sign.
        assert mx.abs(copied[name] - trained[name]).mean() < 1e-6, name


def test_mlx_lm_trains_its_default_keys_or_ours(contenders: ModuleType) -> None:
    trained = {}
    for name in ("exact", "mlx-lm-qk", "mlx-lm"):
        model = contenders.make(name, TASK, SMALL).opened.loaded.model
        trained[name] = {
            key.rsplit(".", 1)[0] for key, _ in tree_flatten(model.trainable_parameters())
        }
    assert trained["mlx-lm-qk"] == trained["exact"]
    assert len(trained["exact"]) == 3 * 2
    assert len(trained["mlx-lm"]) == 3 * 7


def test_only_the_label_counts_in_mlx_lms_loss(contenders: ModuleType) -> None:
    """mlx-lm's own loss of its own batch is the cross-entropy of the label tokens."""
    opened = contenders.make("exact", TASK, SMALL).opened
    prompts = opened.test_prompts()
    assert len({len(prompt.token_ids) for prompt in prompts}) > 1
    model = opened.loaded.model
    expected = []
    for prompt in prompts:
        logits = np.array(model(mx.array([prompt.token_ids]))[0, -1], dtype=np.float64)
        expected.append(np.log(np.exp(logits).sum()) - logits[prompt.target[0]])
    tokens, counted = contenders.label_batch(prompts)
    assert tokens.shape[1] % 32 == 1
    value, number = default_loss(model, tokens, counted)
    assert number.item() == len(prompts)
    assert value.item() == pytest.approx(np.mean(expected), abs=1e-4)
