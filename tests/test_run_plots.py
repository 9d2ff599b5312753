"""Figures of a run folder: the numbers of its files, read back from the Axes that they end on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import invoke
from figure_support import bars, by_label, curves, image, ticks
from figure_support import drawn as panels_of
from made_heads import evaluated, evaluation, heads, update, write_run

from abft_mlx.analysis.run_data import RunData, read_run
from abft_mlx.analysis.run_plots import (
    beside_notes,
    named,
    run_figure_names,
    run_plots,
    top_heads,
)

BEFORE, AFTER = [[2, 2, 0], [1, 3, 0], [0, 4, 0]], [[4, 0, 0], [0, 4, 0], [1, 1, 2]]


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    """A whole run."""
    validated = {2: 0.5, 4: 0.75}
    updates = [update(n, validation_accuracy=validated.get(n)) for n in (1, 2, 3, 4)]
    write_run(
        tmp_path / "run",
        updates=updates,
        seen=heads(examples=2, detected=True),
        measured=evaluation(BEFORE, AFTER),
        validation={"prompts": 64, "before": 0.25},
    )
    return read_run(tmp_path / "run")


def drawn(
    name: str, run: RunData, beside: tuple[RunData, ...] = ()
) -> list[tuple[str, str, list[Any]]]:
    """Each plot of a figure: its stem, caption, and the Axes that it drew on."""
    (one,) = run_plots(run, beside, [name])
    assert one.missing == ""
    return [(plot.stem, plot.caption, panels_of(plot.draw)) for plot in one.plots]


class TestFigures:
    def test_training(self, run: RunData) -> None:
        ((stem, caption, panels),) = drawn("training", run)
        assert stem == "training"
        assert caption == ("tiny on mails.csv; k = 4; 4 updates of 32 prompts; training seed 42")
        found = by_label(panels)
        assert curves(found["loss"])["abft"] == ([32, 64, 96, 128], [3, 1.5, 1, 0.75])
        assert curves(found["induction heads in a prompt"])["abft"][1] == [3.75, 3.5, 3.25, 3]
        assert curves(found["validation accuracy (%)"])["abft"] == ([64, 128], [50, 75])
        assert len(found) == 6

    def test_a_run_end_to_end_has_no_attention_objective(
        self, tmp_path: Path, run: RunData
    ) -> None:
        zeros = {"punish": 0.0, "reward": 0.0, "induction_heads": 0.0, "A": 0.0}
        other = read_run(
            write_run(tmp_path / "other", kind="end_to_end", seed=7,
                      updates=[update(n, **zeros) for n in (1, 2)])
        )  # fmt: skip
        ((_, caption, panels),) = drawn("training", other)
        assert [*by_label(panels)] == ["loss"]
        assert "cross-entropy" in caption
        ((_, caption, panels),) = drawn("training", run, (other,))
        found = by_label(panels)
        assert {*curves(found["loss"])} == {"abft", "end_to_end"}
        assert {*curves(found["punish weight A"])} == {"abft"}
        assert "the loss of end_to_end is the cross-entropy of the label, not ABFT's" in caption
        assert caption.endswith("training seeds 42, 7")

    def test_validation_over_time(self, run: RunData) -> None:
        ((stem, caption, (axes,)),) = drawn("time_to_accuracy", run)
        assert stem == "time-to-accuracy"
        assert curves(axes)["abft"] == ([1, 2], [50, 75])
        assert curves(axes)["untrained"][1] == [25, 25]
        assert axes.get_xscale() == "log"
        assert "n = 64 validation prompts; seconds on: a machine" in caption

    def test_label_attention(self, run: RunData) -> None:
        ((_, caption, (axes,)),) = drawn("label_attention", run)
        found = curves(axes)
        for name in ("before", "after"):
            state = run.heads.states[name]
            mean = state.magnitude.mean(axis=1)
            gold = (mean + state.correctness.mean(axis=1)) / 2
            np.testing.assert_allclose(found[f"{name}, all labels"][1], mean)
            np.testing.assert_allclose(found[f"{name}, gold label"][1], gold)
        assert "n = 64 prompts" in caption

    def test_attention(self, run: RunData) -> None:
        made = drawn("attention", run)
        assert [stem for stem, _, _ in made] == ["attention-1", "attention-2"]
        for (_, caption, panels), example in zip(made, run.heads.examples, strict=True):
            for panel, name in zip(panels, ("before", "after"), strict=True):
                want = example.rows[name][[0, 0, 2, 2], [0, 1, 0, 1]]
                np.testing.assert_array_equal(image(panel), want)
                assert ticks(panel.yaxis) == ["L0 H0", "L0 H1", "L2 H0", "L2 H1"]
                assert panel.get_ylabel() == name
                # The same scale in every figure: the square root of 0 to 1.
                np.testing.assert_allclose(panel.images[0].norm([0, 0.25, 1]), [0, 0.5, 1])
            right = {line.get_label(): [*line.get_xdata()] for line in panels[0].lines}
            assert right == {"label equal to the gold one": [16, 32], "other label": [8, 24]}
            assert "n = 1 prompt of 40 tokens; gold label: spam; all heads" in caption
            assert ticks(panels[0].xaxis) == []
            named = dict(zip(panels[1].get_xticks(), ticks(panels[1].xaxis), strict=True))
            assert {8, 16, 24, 32, 39} <= set(named)

    @pytest.mark.parametrize("part", ["magnitude", "correctness", "share", "sink"])
    def test_maps(self, run: RunData, part: str) -> None:
        ((stem, _, panels),) = drawn(part, run)
        assert stem == part
        before, after = (getattr(state, part) for state in run.heads.states.values())
        for panel, want in zip(panels, (before, after, after - before), strict=True):
            np.testing.assert_array_equal(image(panel), want)
        # One scale for the states; a change, and what has two signs, is white at zero.
        first, second, change = (panel.images[0].get_clim() for panel in panels)
        assert first == second
        assert change[0] == -change[1]
        assert (first[0] == -first[1]) == (part == "correctness")
        assert [panel.get_title() for panel in panels] == ["before", "after", "after − before"]

    def test_head_weights(self, tmp_path: Path) -> None:
        seen = heads()
        weight = np.array([[0.5, -1.0], [np.nan, np.nan], [2.0, 0.25]])
        states = {**seen.states, "after": replace(seen.states["after"], weight=weight)}
        run = read_run(write_run(tmp_path / "run", seen=replace(seen, states=states)))
        ((stem, caption, (panel,)),) = drawn("head_weights", run)
        assert stem == "weight"
        np.testing.assert_array_equal(image(panel), weight)
        assert panel.images[0].get_clim() == (-2, 2)
        assert "weights of heads in the label-attention read-out" in caption

    def test_detectors(self, run: RunData) -> None:
        made = drawn("detectors", run)
        assert [stem for stem, _, _ in made] == ["detectors-before", "detectors-after"]
        for (_, caption, (axes,)), state in zip(made, run.heads.states.values(), strict=True):
            known = [0, 2]
            want = np.stack([state.detected.induction[known].ravel(),
                             state.magnitude[known].ravel()], axis=1)  # fmt: skip
            np.testing.assert_allclose(axes.collections[0].get_offsets(), want)
            assert "16 rows of 50 repeated random tokens" in caption

    def test_shift(self, run: RunData, tmp_path: Path) -> None:
        ((_, _, (axes,)),) = drawn("shift", run)
        found = curves(axes)
        np.testing.assert_array_equal(found["W_Q"][1], [0.25, np.nan, 0.5])
        np.testing.assert_array_equal(found["W_K"][1], [0.125, np.nan, 0.75])
        other = read_run(write_run(tmp_path / "e", kind="end_to_end", shift={"q": [1], "k": [2]}))
        ((_, _, (axes,)),) = drawn("shift", run, (other,))
        assert [*curves(axes)] == ["abft W_Q", "abft W_K", "end_to_end W_Q", "end_to_end W_K"]

    def test_confusion(self, run: RunData) -> None:
        ((_, caption, panels),) = drawn("confusion", run)
        for panel, counts in zip(panels, (BEFORE, AFTER), strict=True):
            want = 100 * np.array(counts) / np.sum(counts, axis=1, keepdims=True)
            np.testing.assert_allclose(image(panel), want)
            found = {text.get_position(): text.get_text() for text in panel.texts}
            assert found == {
                (column, row): str(count)
                for row, line in enumerate(counts)
                for column, count in enumerate(line)
            }
        assert [panel.get_title() for panel in panels] == ["before", "after"]
        assert ticks(panels[0].yaxis) == ["ham", "spam", "$ca_t$"]
        assert "n = 12 test prompts" in caption

    def test_a_classifiers_answers_come_first(self, tmp_path: Path) -> None:
        measured = evaluation(BEFORE, BEFORE)
        for side in (measured, measured["base"]):
            side["methods"]["classifier"] = evaluated(AFTER)
        run = read_run(write_run(tmp_path / "run", measured=measured))
        ((_, caption, panels),) = drawn("confusion", run)
        assert [panel.get_title() for panel in panels] == ["before", "after"]
        assert [text.get_text() for text in panels[1].texts][:3] == ["4", "0", "0"]
        assert "the classifier's answers" in caption

    def test_reliability(self, run: RunData) -> None:
        ((_, _, (upper, lower)),) = drawn("reliability", run)
        assert curves(upper)["before"] == ([95], [pytest.approx(100 * 5 / 12)])
        assert curves(upper)["after"] == ([95], [pytest.approx(100 * 10 / 12)])
        assert bars(lower) == {name: [0] * 9 + [12] for name in ("before", "after")}

    def test_an_evaluation_without_an_adapter_is_the_bases(self, tmp_path: Path) -> None:
        measured = {"adapter": None, "methods": {"vanilla": evaluated(BEFORE)}}
        run = read_run(write_run(tmp_path / "run", measured=measured))
        ((_, _, panels),) = drawn("confusion", run)
        assert [panel.get_title() for panel in panels] == ["before"]
        assert ticks(panels[0].xaxis) == ["0", "1", "2"]


class TestBeside:
    def test_states_of_another_run(self, tmp_path: Path, run: RunData) -> None:
        seen = heads(examples=2, seed=0)
        other = read_run(write_run(tmp_path / "e", kind="end_to_end", seen=seen))
        ((_, _, (axes,)),) = drawn("label_attention", run, (other,))
        assert [name.removesuffix(", all labels") for name in curves(axes)][::2] == [
            "before", "abft", "end_to_end",
        ]  # fmt: skip
        panels = drawn("attention", run, (other,))[0][2]
        assert [panel.get_ylabel() for panel in panels] == ["before", "abft", "end_to_end"]
        want = seen.examples[0].rows["after"][[0, 0, 2, 2], [0, 1, 0, 1]].astype(np.float16)
        np.testing.assert_array_equal(image(panels[2]), want)
        assert beside_notes(run, [other]) == []

    def test_what_does_not_fit_is_said(self, tmp_path: Path, run: RunData) -> None:
        without = read_run(write_run(tmp_path / "w"))
        foreign = read_run(write_run(tmp_path / "f", seen=heads(), fingerprint="sha256:1"))
        prompts = read_run(write_run(tmp_path / "p", seen=heads(tokens=41)))
        first, second, third = beside_notes(run, [without, foreign, prompts])
        assert f"{tmp_path / 'w'} holds no heads.npz; abft-mlx heads {tmp_path / 'w'}" in first
        assert "another base" in second
        assert "none of the prompts" in third
        assert len(drawn("attention", run, (without, foreign, prompts))[0][2]) == 2
        ((_, _, (axes,)),) = drawn("label_attention", run, (without, foreign, prompts))
        assert len(curves(axes)) == 2 * 3

    def test_names_differ(self, tmp_path: Path) -> None:
        def names(*runs: tuple[str, str]) -> list[str]:
            read = [read_run(write_run(tmp_path / path, kind=kind)) for path, kind in runs]
            return [one.name for one in named(read)]

        assert names(("a", "abft"), ("b", "end_to_end")) == ["abft", "end_to_end"]
        assert names(("a", "abft"), ("b", "abft")) == ["a", "b"]
        assert names(("x/a", "abft"), ("y/a", "abft")) == [
            str(tmp_path / "x/a"), str(tmp_path / "y/a"),
        ]  # fmt: skip
        assert len(set(names(("a", "abft"), ("a", "abft")))) == 2


class TestTopHeads:
    def test_those_with_most_attention_on_labels(self) -> None:
        rows = np.zeros((4, 3, 6))
        rows[1] = np.nan
        rows[2, 1, [1, 3]] = 0.25
        rows[3, 2, 3] = 0.75
        rows[0, 0, 2] = 1.0  # no label
        later = np.zeros_like(rows)
        later[1] = np.nan
        later[0, 1, 1] = 0.6
        chosen, total = top_heads({"before": rows, "after": later}, np.array([1, 3]), limit=6)
        assert (chosen, total) == ([(0, 1), (2, 1), (3, 2)], 9)

    def test_a_large_model_says_what_it_shows(self, tmp_path: Path) -> None:
        run = read_run(write_run(tmp_path / "run", seen=heads(32, 32, 300)))
        ((_, caption, panels),) = drawn("attention", run)
        assert image(panels[0]).shape == (24, 300)
        assert "24 of 992 heads: those with the most attention on labels in any state" in caption
        # Not all tokens have room: the labels and the last ones have.
        places = [*map(int, panels[1].get_xticks())]
        assert {60, 120, 180, 240, 299} <= set(places)
        assert len(places) < 60
        assert not drawn("magnitude", run)[0][2][0].texts


class TestMissing:
    def test_each_thing_that_is_missing_is_told_with_the_way_to_get_it(
        self, tmp_path: Path
    ) -> None:
        run = read_run(write_run(tmp_path / "run", shift=None))
        found = {one.name: one.missing for one in run_plots(run)}
        assert set(found) == set(run_figure_names())
        assert all(found.values())
        for name in ("label_attention", "attention", "magnitude", "share", "sink", "detectors"):
            assert found[name] == (
                f"{run.folder} holds no heads.npz; abft-mlx heads {run.folder} writes it"
            )
        for name in ("confusion", "reliability"):
            assert f"abft-mlx eval {run.folder} writes it" in found[name]
        assert "training.validate_every" in found["time_to_accuracy"]
        assert "metrics.jsonl" in found["training"]
        assert "no shift" in found["shift"]

    def test_heads_without_detectors_or_prompts(self, tmp_path: Path) -> None:
        run = read_run(write_run(tmp_path / "run", seen=heads(examples=0)))
        found = {one.name: one.missing for one in run_plots(run)}
        assert f"abft-mlx heads {run.folder} --overwrite adds them" in found["detectors"]
        assert f"abft-mlx heads {run.folder} --overwrite" in found["attention"]
        assert found["magnitude"] == found["label_attention"] == ""

    def test_an_evaluation_without_bins(self, tmp_path: Path) -> None:
        measured = evaluation(BEFORE, AFTER)
        for one in (measured, measured["base"]):
            del one["methods"]["vanilla"]["reliability"]
        run = read_run(write_run(tmp_path / "run", measured=measured))
        found = {one.name: one for one in run_plots(run)}
        assert "does not hold the bins" in found["reliability"].missing
        assert len(found["confusion"].plots) == 1

    def test_a_model_without_heads(self, tmp_path: Path) -> None:
        seen = heads(1, 2, examples=0)
        for one in seen.states.values():
            one.magnitude[:] = np.nan
        run = read_run(write_run(tmp_path / "run", seen=seen))
        found = {one.name: one.missing for one in run_plots(run)}
        assert "has no attention heads" in found["magnitude"]

    @pytest.mark.parametrize(
        ("file", "text", "said"),
        [
            ("run.json", "{", "run.json: cannot be read"),
            ("run.json", "[1]", "run.json: cannot be read"),
            ("run.json", '{"schema": 9}', "run.json: is of schema 9 and this abft-mlx reads 1"),
            ("run.json", '{"shift": {"q": ["x"]}}', "run.json: cannot be read (shift.q"),
            ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl line 1: cannot be read (step: "),
            ("metrics.jsonl", "nothing\n", "metrics.jsonl line 1: cannot be read"),
            ("metrics.jsonl", "3\n", "metrics.jsonl line 1: cannot be read"),
            ("recipe.yaml", "a: [", "recipe.yaml: cannot be read"),
            ("recipe.yaml", "- a", "recipe.yaml: cannot be read"),
            ("eval.json", "null", "eval.json: cannot be read"),
            ("eval.json", '{"methods": {"a": {}}}', "(methods.a.accuracy: Field required)"),
            ("eval.json", "[" * 30_000, "eval.json: cannot be read"),
            ("heads.npz", "none", "heads.npz: is no file of heads"),
        ],
    )
    def test_broken_files_are_named_in_one_line(
        self, tmp_path: Path, file: str, text: str, said: str
    ) -> None:
        folder = write_run(tmp_path / "run", updates=[update(1)])
        (folder / file).write_text(text, encoding="utf-8")
        for command in (["plot", folder, "--list"], ["report", folder]):
            result = invoke(*command)
            assert result.exit_code == 2
            assert said in result.stderr
            assert result.stderr.count("\n") == 1
        assert not (folder / "report.html").exists()

    def test_a_line_that_is_being_written_is_left_out(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", updates=[update(1), update(2)])
        path = folder / "metrics.jsonl"
        path.write_bytes(path.read_bytes() + b'{"step": 3, "see')
        assert [one.step for one in read_run(folder).updates] == [1, 2]
