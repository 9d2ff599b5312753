"""Figures of a run folder: the numbers of its files, read back from the Axes that they end on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_support import axes, ticks
from made_heads import evaluated, evaluation, example, heads, update, write_run

from abft_mlx.analysis import run_heads
from abft_mlx.analysis.run_facts import RunFacts, read_run
from abft_mlx.analysis.run_plots import beside_notes, named, run_figure_names, run_plots
from abft_mlx.errors import OutputError

BEFORE, AFTER = [[2, 2, 0], [1, 3, 0], [0, 4, 0]], [[4, 0, 0], [0, 4, 0], [1, 1, 2]]


@pytest.fixture
def run(tmp_path: Path) -> RunFacts:
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
    name: str, run: RunFacts, beside: tuple[RunFacts, ...] = ()
) -> list[tuple[str, str, Any]]:
    """Each plot of a figure: its stem, caption, and the Axes that it drew on."""
    (one,) = run_plots(run, beside, [name])
    assert one.missing == ""
    return [(plot.stem, plot.caption, plot.draw(axes())) for plot in one.plots]


def curves(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        one.get_label(): ([*map(float, one.get_xdata())], [*map(float, one.get_ydata())])
        for one in ax.lines
    }


def panels(ax: Any) -> dict[str, Any]:
    return {one.get_ylabel().replace("\n", " "): one for one in ax.child_axes}


class TestFigures:
    def test_training(self, run: RunFacts) -> None:
        ((stem, caption, ax),) = drawn("training", run)
        assert stem == "training"
        assert caption == ("tiny on mails.csv; k = 4; 4 updates of 32 prompts; training seed 42")
        found = panels(ax)
        assert curves(found["loss"])["abft"] == ([32, 64, 96, 128], [3, 1.5, 1, 0.75])
        assert curves(found["induction heads in a prompt"])["abft"][1] == [3.75, 3.5, 3.25, 3]
        assert curves(found["validation accuracy (%)"])["abft"] == ([64, 128], [50, 75])
        assert len(found) == 6

    def test_a_run_end_to_end_has_no_attention_objective(
        self, tmp_path: Path, run: RunFacts
    ) -> None:
        zeros = {"punish": 0.0, "reward": 0.0, "induction_heads": 0.0, "A": 0.0}
        other = read_run(
            write_run(tmp_path / "other", kind="end_to_end", seed=7,
                      updates=[update(n, **zeros) for n in (1, 2)])
        )  # fmt: skip
        ((_, caption, ax),) = drawn("training", other)
        assert [*panels(ax)] == ["loss"]
        assert "cross-entropy" in caption
        ((_, caption, ax),) = drawn("training", run, (other,))
        found = panels(ax)
        assert {*curves(found["loss"])} == {"abft", "end_to_end"}
        assert {*curves(found["punish weight A"])} == {"abft"}
        assert "the loss of end_to_end is the cross-entropy of the label, not ABFT's" in caption
        assert caption.endswith("training seeds 42, 7")

    def test_validation_over_time(self, run: RunFacts) -> None:
        ((stem, caption, ax),) = drawn("time_to_accuracy", run)
        assert stem == "time-to-accuracy"
        assert curves(ax)["abft"] == ([1, 2], [50, 75])
        assert curves(ax)["untrained"][1] == [25, 25]
        assert "n = 64 validation prompts" in caption
        assert "seconds on: a machine" in caption

    def test_label_attention(self, run: RunFacts) -> None:
        ((_, caption, ax),) = drawn("label_attention", run)
        found = curves(ax)
        for name in ("before", "after"):
            state = run.heads.states[name]
            mean = state.magnitude.mean(axis=1)
            gold = (mean + state.correctness.mean(axis=1)) / 2
            np.testing.assert_allclose(found[f"{name}, all labels"][1], mean)
            np.testing.assert_allclose(found[f"{name}, gold label"][1], gold)
        assert "n = 64 prompts" in caption

    def test_attention(self, run: RunFacts) -> None:
        made = drawn("attention", run)
        assert [stem for stem, _, _ in made] == ["attention-1", "attention-2"]
        for (_, caption, ax), one in zip(made, run.heads.examples, strict=True):
            for panel, name in zip(ax.child_axes, ("before", "after"), strict=True):
                want = one.rows[name][[0, 0, 2, 2], [0, 1, 0, 1]]
                np.testing.assert_array_equal(np.asarray(panel.images[0].get_array()), want)
                assert [text for _, text in ticks(panel.yaxis)] == [
                    "L0 H0", "L0 H1", "L2 H0", "L2 H1",
                ]  # fmt: skip
                assert panel.get_ylabel() == name
            right = {line.get_label(): [*line.get_xdata()] for line in ax.child_axes[0].lines}
            assert right == {"label equal to the gold one": [16, 32], "other label": [8, 24]}
            assert "n = 1 prompt of 40 tokens; gold label: spam; all heads" in caption

    @pytest.mark.parametrize("part", ["magnitude", "correctness", "share", "sink"])
    def test_maps(self, run: RunFacts, part: str) -> None:
        ((stem, _, ax),) = drawn(part, run)
        assert stem == part
        before, after = (getattr(one, part) for one in run.heads.states.values())
        for panel, want in zip(ax.child_axes, (before, after, after - before), strict=True):
            shown = np.ma.filled(np.ma.asarray(panel.images[0].get_array()), np.nan)
            np.testing.assert_array_equal(shown, want)

    def test_detectors(self, run: RunFacts) -> None:
        made = drawn("detectors", run)
        assert [stem for stem, _, _ in made] == ["detectors-before", "detectors-after"]
        for (_, caption, ax), state in zip(made, run.heads.states.values(), strict=True):
            known = [0, 2]
            want = np.stack([state.detected.induction[known].ravel(),
                             state.magnitude[known].ravel()], axis=1)  # fmt: skip
            np.testing.assert_allclose(ax.collections[0].get_offsets(), want)
            assert "16 rows of 50 repeated random tokens" in caption

    def test_shift(self, run: RunFacts, tmp_path: Path) -> None:
        ((_, _, ax),) = drawn("shift", run)
        found = curves(ax)
        np.testing.assert_array_equal(found["W_Q"][1], [0.25, np.nan, 0.5])
        np.testing.assert_array_equal(found["W_K"][1], [0.125, np.nan, 0.75])
        other = read_run(write_run(tmp_path / "e", kind="end_to_end", shift={"q": [1], "k": [2]}))
        ((_, _, ax),) = drawn("shift", run, (other,))
        assert [*curves(ax)] == ["abft W_Q", "abft W_K", "end_to_end W_Q", "end_to_end W_K"]

    def test_confusion(self, run: RunFacts) -> None:
        ((_, caption, ax),) = drawn("confusion", run)
        for panel, counts in zip(ax.child_axes, (BEFORE, AFTER), strict=True):
            want = 100 * np.array(counts) / np.sum(counts, axis=1, keepdims=True)
            np.testing.assert_allclose(np.asarray(panel.images[0].get_array()), want)
        assert [one.get_title() for one in ax.child_axes] == ["before", "after"]
        assert [text for _, text in ticks(ax.child_axes[0].yaxis)] == ["ham", "spam", r"\$ca_t\$"]
        assert "n = 12 test prompts" in caption

    def test_reliability(self, run: RunFacts) -> None:
        ((_, _, ax),) = drawn("reliability", run)
        found = curves(ax.child_axes[0])
        assert found["before"] == ([95], [pytest.approx(100 * 5 / 12)])
        assert found["after"] == ([95], [pytest.approx(100 * 10 / 12)])

    def test_an_evaluation_without_an_adapter_is_the_bases(self, tmp_path: Path) -> None:
        measured = {"adapter": None, "methods": {"vanilla": evaluated(BEFORE)}}
        run = read_run(write_run(tmp_path / "run", measured=measured))
        ((_, _, ax),) = drawn("confusion", run)
        assert [one.get_title() for one in ax.child_axes] == ["before"]
        assert [text for _, text in ticks(ax.child_axes[0].xaxis)] == ["0", "1", "2"]


class TestBeside:
    def test_states_of_another_run(self, tmp_path: Path, run: RunFacts) -> None:
        seen = heads(examples=2, seed=0)
        other = read_run(write_run(tmp_path / "e", kind="end_to_end", seen=seen))
        ((_, _, ax),) = drawn("label_attention", run, (other,))
        assert [one.removesuffix(", all labels") for one in curves(ax)][::2] == [
            "before", "abft", "end_to_end",
        ]  # fmt: skip
        ax = drawn("attention", run, (other,))[0][2]
        assert [one.get_ylabel() for one in ax.child_axes] == ["before", "abft", "end_to_end"]
        want = seen.examples[0].rows["after"][[0, 0, 2, 2], [0, 1, 0, 1]].astype(np.float16)
        np.testing.assert_array_equal(np.asarray(ax.child_axes[2].images[0].get_array()), want)
        assert beside_notes(run, [other]) == []

    def test_what_does_not_fit_is_told(self, tmp_path: Path, run: RunFacts) -> None:
        without = read_run(write_run(tmp_path / "w"))
        foreign = read_run(write_run(tmp_path / "f", seen=heads(), fingerprint="sha256:1"))
        prompts = read_run(write_run(tmp_path / "p", seen=heads(tokens=41)))
        first, second, third = beside_notes(run, [without, foreign, prompts])
        assert f"{tmp_path / 'w'} holds no heads.npz; abft-mlx heads {tmp_path / 'w'}" in first
        assert "another base" in second
        assert "none of the prompts" in third
        ax = drawn("attention", run, (without, foreign, prompts))[0][2]
        assert len(ax.child_axes) == 2
        ((_, _, ax),) = drawn("label_attention", run, (without, foreign, prompts))
        assert len(curves(ax)) == 2 * 3

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
        chosen, total = run_heads.top_heads(
            {"before": rows, "after": later}, np.array([1, 3]), limit=6
        )
        assert (chosen, total) == ([(0, 1), (2, 1), (3, 2)], 9)

    def test_a_large_model_says_what_it_shows(self, tmp_path: Path) -> None:
        run = read_run(write_run(tmp_path / "run", seen=heads(32, 32, 60)))
        ((_, caption, ax),) = drawn("attention", run)
        assert ax.child_axes[0].images[0].get_array().shape == (24, 60)
        assert "24 of 992 heads: those with the most attention on labels in any state" in caption


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
            assert f"abft-mlx eval --adapter {run.folder} writes it" in found[name]
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
        ("file", "text", "told"),
        [
            ("run.json", "{", "run.json: cannot be read"),
            ("run.json", "[1]", "run.json: cannot be read (it holds no object)"),
            ("run.json", '{"shift": {"q": ["x"]}}', "shift.q is not made of numbers"),
            ("run.json", '{"shift": {"q": 3}}', "shift.q is no list"),
            ("run.json", '{"shift": {"q": [[1]]}}', "shift.q is no list"),
            ("metrics.jsonl", '{"loss": 1}\n', "a line has no seen_examples"),
            ("recipe.yaml", "a: [", "recipe.yaml line 1: expected the node content"),
            (
                "recipe.yaml",
                "- a",
                "recipe.yaml: a recipe is a map of sections, this is",
            ),
            ("metrics.jsonl", "nothing\n", "metrics.jsonl: cannot be read"),
            ("metrics.jsonl", "3\n", "metrics.jsonl: cannot be read (a line is no object)"),
            ("metrics.jsonl", '{"loss": "x"}\n', "loss is not made of numbers"),
            ("eval.json", "null", "eval.json: cannot be read (it holds no object)"),
            ("heads.npz", "none", "heads.npz: is no file of heads"),
        ],
    )
    def test_broken_files_are_named(self, tmp_path: Path, file: str, text: str, told: str) -> None:
        folder = write_run(tmp_path / "run", updates=[update(1)])
        (folder / file).write_text(text, encoding="utf-8")
        with pytest.raises(OutputError) as caught:
            read_run(folder)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ("x", "a method is no object"),
            ({"confusion": [1, 2]}, "confusion is no square table"),
            ({"reliability": []}, "reliability is no object"),
            (
                {"reliability": {"count": [1], "confidence": [1, 2], "accuracy": [1]}},
                "equally many",
            ),
        ],
    )
    def test_a_broken_evaluation_is_named(self, tmp_path: Path, values: Any, told: str) -> None:
        measured = {"adapter": None, "methods": {"vanilla": values}}
        run = read_run(write_run(tmp_path / "run", measured=measured))
        with pytest.raises(OutputError, match=told):
            run_plots(run, (), ["confusion"])

    def test_sections_of_another_kind_count_as_absent(self, tmp_path: Path) -> None:
        folder = write_run(
            tmp_path / "run", updates=[update(1, validation_accuracy=0.5)], seen=heads(),
            measured={"methods": {"vanilla": evaluated(BEFORE)}, "base": 3, "labels": 4},
            model="tiny", data=None, seeds=[], validation="none",
        )  # fmt: skip
        (folder / "recipe.yaml").write_text("objective: 1\nprompt: []\n", encoding="utf-8")
        run = read_run(folder)
        for name in run_figure_names():
            for one in run_plots(run, (), [name])[0].plots:
                one.draw(axes())
                assert one.caption.startswith("? on ?")

    def test_a_line_that_is_being_written_does_not_count(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", updates=[update(1), update(2)])
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"step": 3, "seen')
        assert read_run(folder).seen.tolist() == [32, 64]


def test_made_examples_are_as_wide_as_said() -> None:
    assert example(3, 2, 40, ("before",)).rows["before"].shape == (3, 2, 40)
