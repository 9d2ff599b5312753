"""Figures of a run: the numbers of its files, read back from the Axes; and the plot command."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import document, invoke
from figure_support import bars, by_label, curves, drawn, image, ticks
from made_cells import answers, cell, study
from made_runs import AFTER, BEFORE, LABELS, evaluated, evaluation, heads, update, write_run

from abft_mlx import analysis
from abft_mlx.analysis.run_data import RunData, read_run
from abft_mlx.analysis.run_plots import RUN_FIGURES, top_heads
from abft_mlx.analysis.style import Plot
from abft_mlx.induction import write_heads

WITHOUT = (1,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole run, whose second layer has no heads."""
    validated = {2: 0.5, 4: 0.75}
    return write_run(
        tmp_path / "run",
        heads(examples=2, detected=True, without=WITHOUT),
        updates=[update(n, validation_accuracy=validated.get(n)) for n in (1, 2, 3, 4)],
        measured=evaluation(),
    )


@pytest.fixture
def run(folder: Path) -> RunData:
    return read_run(folder)


def plots(name: str, run: RunData) -> list[tuple[Plot, Any]]:
    """Each plot of a figure, and the Axes that it drew on."""
    found = RUN_FIGURES[name](run)
    assert not isinstance(found, str), found
    return [(plot, drawn(plot.draw)) for plot in found]


class TestFigures:
    def test_training(self, run: RunData, tmp_path: Path) -> None:
        ((plot, axes),) = plots("training", run)
        assert (plot.stem, plot.caption) == (
            "training", "tiny on mails.csv; k = 4; 4 updates of 32 prompts; training seed 42",
        )  # fmt: skip
        panels = by_label(axes)
        assert curves(panels["loss"])["abft"] == ([32, 64, 96, 128], [3, 1.5, 1, 0.75])
        assert curves(panels["induction heads in a prompt"])["abft"][1] == [3.75, 3.5, 3.25, 3]
        assert curves(panels["validation accuracy (%)"])["abft"] == ([64, 128], [50, 75])
        assert len(panels) == 6
        other = write_run(tmp_path / "e", kind="end_to_end", updates=[update(1), update(2)])
        ((plot, axes),) = plots("training", read_run(other))
        assert [*by_label(axes)] == ["loss"]
        assert "the loss is the cross-entropy of the label" in plot.caption

    def test_validation_over_time(self, run: RunData) -> None:
        ((plot, (axes,)),) = plots("time_to_accuracy", run)
        assert curves(axes)["abft"] == ([1, 2], [50, 75])
        assert curves(axes)["untrained"][1] == [25, 25]
        assert axes.get_xscale() == "log"
        assert "n = 64 validation prompts; seconds on: a machine" in plot.caption

    def test_label_attention(self, run: RunData) -> None:
        ((plot, (axes,)),) = plots("label_attention", run)
        for name, state in run.heads.states.items():
            mean = state.magnitude.mean(axis=1)
            gold = (mean + state.correctness.mean(axis=1)) / 2
            np.testing.assert_allclose(curves(axes)[f"{name}, all labels"][1], mean)
            np.testing.assert_allclose(curves(axes)[f"{name}, gold label"][1], gold)
        assert "n = 64 prompts" in plot.caption

    def test_attention(self, run: RunData) -> None:
        made = plots("attention", run)
        assert [plot.stem for plot, _ in made] == ["attention-1", "attention-2"]
        for (_, panels), example in zip(made, run.heads.examples, strict=True):
            for panel, name in zip(panels, ("before", "after"), strict=True):
                want = example.rows[name][[0, 0, 2, 2], [0, 1, 0, 1]]
                np.testing.assert_array_equal(image(panel), want)
                assert ticks(panel.yaxis) == ["L0 H0", "L0 H1", "L2 H0", "L2 H1"]
                assert panel.get_ylabel() == name
                # The same scale in every figure: the square root of 0 to 1.
                np.testing.assert_allclose(panel.images[0].norm([0, 0.25, 1]), [0, 0.5, 1])
            assert ticks(panels[0].xaxis) == []
            assert {8, 16, 24, 32, 39} <= set(panels[1].get_xticks())
        plot, panels = made[0]
        marks = {line.get_label(): [*line.get_xdata()] for line in panels[0].lines}
        assert marks == {"label equal to the gold one": [16, 32], "other label": [8, 24]}
        assert "n = 1 prompt of 40 tokens; gold label: spam; all heads" in plot.caption

    @pytest.mark.parametrize("part", ["magnitude", "correctness"])
    def test_maps(self, run: RunData, part: str) -> None:
        ((plot, panels),) = plots(part, run)
        assert plot.stem == part
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
        run = read_run(write_run(tmp_path / "run", replace(seen, states=states)))
        ((plot, (panel,)),) = plots("head_weights", run)
        np.testing.assert_array_equal(image(panel), weight)
        assert panel.images[0].get_clim() == (-2, 2)
        assert "weights of heads in the label-attention read-out" in plot.caption

    def test_detectors(self, run: RunData) -> None:
        made = plots("detectors", run)
        assert [plot.stem for plot, _ in made] == ["detectors-before", "detectors-after"]
        for (plot, (axes,)), state in zip(made, run.heads.states.values(), strict=True):
            tables = (state.detected.induction[[0, 2]], state.magnitude[[0, 2]])
            want = np.stack([table.ravel() for table in tables], axis=1)
            np.testing.assert_allclose(axes.collections[0].get_offsets(), want)
            assert "16 rows of 50 repeated random tokens" in plot.caption

    def test_shift(self, run: RunData) -> None:
        ((_, (axes,)),) = plots("shift", run)
        np.testing.assert_array_equal(curves(axes)["W_Q"][1], [0.25, np.nan, 0.5])
        np.testing.assert_array_equal(curves(axes)["W_K"][1], [0.125, np.nan, 0.75])

    def test_confusion_and_reliability(self, run: RunData, tmp_path: Path) -> None:
        ((plot, panels),) = plots("confusion", run)
        for panel, counts in zip(panels, (BEFORE, AFTER), strict=True):
            want = 100 * np.array(counts) / np.sum(counts, axis=1, keepdims=True)
            np.testing.assert_allclose(image(panel), want)
            shown = {text.get_position(): text.get_text() for text in panel.texts}
            assert shown == {(c, r): str(n) for r, row in enumerate(counts)
                             for c, n in enumerate(row)}  # fmt: skip
        assert [panel.get_title() for panel in panels] == ["before", "after"]
        assert ticks(panels[0].yaxis) == list(LABELS)
        assert "n = 12 test prompts" in plot.caption
        ((_, (upper, lower)),) = plots("reliability", run)
        assert curves(upper)["before"] == ([95], [pytest.approx(100 * 5 / 12)])
        assert curves(upper)["after"] == ([95], [pytest.approx(100 * 10 / 12)])
        assert bars(lower) == {name: [0] * 9 + [12] for name in ("before", "after")}
        # A classifier's answers come first.
        measured = evaluation(BEFORE, BEFORE)
        for side in (measured, measured["base"]):
            side["methods"]["classifier"] = evaluated(AFTER)
        classifier = write_run(tmp_path / "c", measured=measured)
        ((plot, panels),) = plots("confusion", read_run(classifier))
        assert [text.get_text() for text in panels[1].texts][:3] == ["4", "0", "0"]
        assert "the classifier's answers" in plot.caption
        # Without an adapter the document is the base's.
        measured = {"adapter": None, "methods": {"vanilla": evaluated(BEFORE)}}
        ((_, panels),) = plots("confusion", read_run(write_run(tmp_path / "b", measured=measured)))
        assert [panel.get_title() for panel in panels] == ["before"]
        assert ticks(panels[0].xaxis) == ["0", "1", "2"]

    def test_of_many_heads_those_with_most_attention_on_labels(self, tmp_path: Path) -> None:
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
        run = read_run(write_run(tmp_path / "run", heads(32, 32, 300)))
        ((plot, panels),) = plots("attention", run)
        assert image(panels[0]).shape == (24, 300)
        assert "24 of 1,024 heads: those with the most attention on labels" in plot.caption
        # Not all tokens have room: the labels and the last ones have.
        places = [*map(int, panels[1].get_xticks())]
        assert {60, 120, 180, 240, 299} <= set(places)
        assert len(places) < 60


def missing(run: RunData) -> dict[str, str]:
    """What is missing for figures, by their name."""
    found = {name: function(run) for name, function in RUN_FIGURES.items()}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", shift=None))
    reasons = missing(run)
    assert set(reasons) == set(RUN_FIGURES)
    for name in ("label_attention", "attention", "magnitude", "detectors"):
        assert f"abft-mlx heads {run.folder} writes it" in reasons[name]
    for name in ("confusion", "reliability"):
        assert f"abft-mlx eval {run.folder} writes it" in reasons[name]
    assert "training.validate_every" in reasons["time_to_accuracy"]
    assert "metrics.jsonl" in reasons["training"]
    assert "no shift" in reasons["shift"]
    reasons = missing(read_run(write_run(tmp_path / "h", heads(examples=0), measured=evaluation())))
    assert set(reasons) == {
        "training", "time_to_accuracy", "attention", "head_weights", "detectors",
    }  # fmt: skip
    assert "--overwrite" in reasons["detectors"]
    none = missing(read_run(write_run(tmp_path / "n", heads(2, 2, without=(0, 1)))))
    assert "has no attention heads" in none["magnitude"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "{", "run.json: cannot be read"),
        ("run.json", "[1]", "run.json: cannot be read"),
        ("run.json", '{"schema": 9}', "run.json: is of schema 9 and this abft-mlx reads 1"),
        ("run.json", '{"shift": {"q": ["x"]}}', "run.json: cannot be read (shift.q"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl line 1: cannot be read (step: "),
        ("recipe.yaml", "a: [", "recipe.yaml: cannot be read"),
        ("eval.json", '{"methods": {"a": {}}}', "(methods.a.accuracy: Field required)"),
        ("heads.npz", "none", "heads.npz: is no file of heads"),
    ],
)
def test_broken_files_are_named_in_one_line(
    folder: Path, file: str, text: str, message: str
) -> None:
    (folder / file).write_text(text, encoding="utf-8")
    for command in (["plot", folder, "--list"], ["report", folder]):
        result = invoke(*command)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_a_line_that_is_being_written_is_left_out(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 5, "see')
    assert [one.step for one in read_run(folder).updates] == [1, 2, 3, 4]


class TestCommand:
    def test_for_a_person(self, folder: Path) -> None:
        (folder / "eval.json").unlink()
        names = "training,shift,confusion"
        result = invoke("plot", folder, "--only", names, "--only", "sink")
        assert result.exit_code == 0, result.stderr
        want = [
            folder / "figures" / f"{name}.{end}"
            for name in ("training", "sink", "shift")
            for end in ("svg", "png")
        ]
        note = (
            f"note: confusion: not drawn: {folder} holds no eval.json with answers; "
            f"abft-mlx eval {folder} writes it"
        )
        assert result.stdout.splitlines() == [*(f"wrote {path}" for path in want), note]
        assert sorted((folder / "figures").iterdir()) == sorted(want)
        svg = want[0].read_text(encoding="utf-8")
        assert "tiny on mails.csv; k = 4; 4 updates of 32 prompts; training seed 42" in svg
        quiet = invoke("plot", folder, "--only", "shift", "--format", "svg", "--quiet")
        assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")

    def test_as_json(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        words = ("--only", "shift", "--output", out, "--format", "svg", "--json")
        result = invoke("plot", folder, *words)
        assert result.exit_code == 0
        caption = "tiny on mails.csv; k = 4; training seed 42"
        assert document(result) == {
            "schema": 1,
            "kind": "run",
            "source": str(folder),
            "output": str(out),
            "figures": [{"name": "shift", "caption": caption, "files": [str(out / "shift.svg")]}],
            "notes": [],
        }
        first = (out / "shift.svg").read_bytes()
        invoke("plot", folder, *words)
        assert (out / "shift.svg").read_bytes() == first

    def test_a_list_draws_nothing_and_needs_no_matplotlib(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = invoke("plot", folder, "--list")
        assert result.exit_code == 0, result.stderr
        assert "detectors: detectors-before, detectors-after" in result.stdout.splitlines()
        assert not (folder / "figures").exists()
        listed = document(invoke("plot", folder, "--list", "--json"))["figures"]
        assert [one["stem"] for one in listed] == [
            "training", "time-to-accuracy", "label-attention", "attention-1", "attention-2",
            "magnitude", "correctness", "share", "sink", "detectors-before", "detectors-after",
            "shift", "confusion", "reliability",
        ]  # fmt: skip
        result = invoke("plot", folder)
        assert result.exit_code == 2
        assert "pip install 'abft-mlx[plots]'" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--only", "pie"], "--only pie: no figure is called that; there are training, "),
            (["--format", "gif"], "--format gif: 'gif' is none of svg, png, pdf"),
            (["--only", "head_weights"], "there is nothing to draw: head_weights: not drawn: "),
            (["--output", "run.json", "--only", "shift"], "run.json: cannot be written"),
        ],
    )
    def test_wrong_usage(
        self, folder: Path, arguments: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        result = invoke("plot", folder, *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1

    def test_what_is_no_run_and_no_study(self, tmp_path: Path) -> None:
        (tmp_path / "list.json").write_text("[]")
        (tmp_path / "text.gz").write_bytes(b"\x1f\x8bno")
        (tmp_path / "bad.json").write_text('{"schema": 1, "cells": [{"model": 3}]}')
        for name, message in (
            ("nowhere", "no such file or folder"),
            (".", "holds neither a run (run.json) nor a study"),
            ("list.json", "cannot be read"),
            ("text.gz", "cannot be read"),
            ("bad.json", "bad.json: cannot be read (cells.0.id: Field required)"),
        ):
            result = invoke("plot", tmp_path / name)
            assert result.exit_code == 2, name
            assert message in result.stderr
            assert len(result.stderr.splitlines()) == 1

    def test_heads_of_a_model_that_no_run_trained(self, tmp_path: Path) -> None:
        seen = heads(states=("before",), detected=True)
        write_heads(
            tmp_path / "seen.npz", replace(seen, facts={"model": "/a/tiny", "data": "x", "k": 3})
        )
        result = invoke("plot", tmp_path / "seen.npz", "--format", "svg", "--json")
        assert result.exit_code == 0, result.stderr
        figures = document(result)["figures"]
        assert [one["name"] for one in figures] == [
            "label_attention", "attention", "magnitude", "correctness", "share", "sink",
            "detectors",
        ]  # fmt: skip
        assert figures[0]["caption"].startswith("tiny on x; k = 3; n = 64 prompts")
        assert (tmp_path / "seen-figures" / "magnitude.svg").is_file()
        wrong = invoke("plot", tmp_path / "seen.npz", "--only", "training")
        assert "no figure is called that; there are label_attention" in wrong.stderr

    def test_a_study_compressed_or_not_or_unfinished(self, tmp_path: Path) -> None:
        cells = [cell("untrained", answers(0.5, 12))]
        cells += [cell("abft", answers(0.7, 12), seed=seed) for seed in (1, 2)]
        analysis.write_study(tmp_path / "made", study(figures=["accuracy", "grid"]), cells)
        packed = tmp_path / "claims.json.gz"
        packed.write_bytes(gzip.compress((tmp_path / "made" / "study.json").read_bytes()))
        half = tmp_path / "half"
        (half / "cells").mkdir(parents=True)
        (half / "study.yaml").write_text(
            "models: [demo]\ntasks: [demo]\nmethods: [abft]\nfigures: [accuracy, grid]\n"
        )
        for one in cells[:2]:
            (half / "cells" / f"{one['id']}.json").write_text(json.dumps(one))
        names = ["accuracy-demo", "head-count-demo", "training-demo"]
        for source, out in (
            (packed, tmp_path / "claims-figures"), (tmp_path / "made", tmp_path / "made"),
            (half, half),
        ):  # fmt: skip
            result = document(invoke("plot", source, "--format", "svg", "--json"))
            assert (result["kind"], result["output"]) == ("study", str(out))
            assert [one["files"] for one in result["figures"]] == [
                [str(out / f"{name}.svg")] for name in names
            ]
            assert result["notes"] == [
                "grid: not drawn: no cell that is done measured what it shows"
            ]
