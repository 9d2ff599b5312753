"""The plot command: files, messages, JSON, what is missing, wrong usage."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_support import document, invoke
from made_cells import answers, cell, run, study
from made_heads import evaluated, evaluation, heads, update, write_run

from abft_mlx import analysis
from abft_mlx.induction import write_heads

COUNTS = [[2, 2, 0], [1, 3, 0], [0, 4, 0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run without an evaluation."""
    return write_run(tmp_path / "run", updates=[update(1), update(2)], seen=heads(detected=True))


@pytest.fixture
def cells() -> list[dict]:
    """A small study's."""

    def measured() -> dict:
        methods = {"vanilla": {**evaluated(COUNTS), "right": answers(0.5, 12)}}
        return {"labels": ["ham", "spam", "eggs"], "methods": methods}

    made = [cell("untrained", evaluation=measured())]
    return made + [cell("abft", seed=seed, evaluation=measured()) for seed in (1, 2)]


class TestRun:
    def test_for_a_person(self, folder: Path) -> None:
        result = invoke("plot", folder, "--only", "training,shift", "--only", "sink")
        assert result.exit_code == 0, result.stderr
        names = ["training", "sink", "shift"]
        want = [folder / "figures" / f"{name}.{end}" for name in names for end in ("svg", "png")]
        assert result.stdout.splitlines() == [f"wrote {path}" for path in want]
        assert sorted((folder / "figures").iterdir()) == sorted(want)
        assert result.stderr == ""
        svg = want[0].read_text(encoding="utf-8")
        assert "tiny on mails.csv; k = 4; 2 updates of 32 prompts; training seed 42" in svg

    def test_as_json(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        result = invoke(
            "plot", folder, "--only", "shift,confusion", "--output", out, "--format", "svg",
            "--width", "column", "--json",
        )  # fmt: skip
        assert result.exit_code == 0
        found = document(result)
        assert found == {
            "schema": 1,
            "kind": "run",
            "source": str(folder),
            "output": str(out),
            "figures": [
                {
                    "name": "shift",
                    "caption": "tiny on mails.csv; k = 4; training seed 42",
                    "files": [str(out / "shift.svg")],
                }
            ],
            "notes": [
                f"confusion: not drawn: {folder} holds no eval.json; "
                f"abft-mlx eval {folder} writes it"
            ],
        }
        assert [path.name for path in out.iterdir()] == ["shift.svg"]
        assert f"note: {found['notes'][0]}" in result.stderr
        # 3.3 inches of 72 points.
        assert 'width="237.6pt"' in (out / "shift.svg").read_text(encoding="utf-8")

    def test_a_list_draws_nothing_and_needs_no_matplotlib(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = invoke("plot", folder, "--list")
        assert result.exit_code == 0, result.stderr
        lines = result.stdout.splitlines()
        assert "detectors: detectors-before, detectors-after" in lines
        assert "attention: attention-1" in lines
        # One note for all that is missing for the same reason.
        assert [line for line in lines if "eval.json" in line] == [
            f"note: confusion, reliability: not drawn: {folder} holds no eval.json; "
            f"abft-mlx eval {folder} writes it"
        ]
        assert not (folder / "figures").exists()
        found = document(invoke("plot", folder, "--list", "--json"))
        assert [one["stem"] for one in found["figures"]] == [
            "training", "label-attention", "attention-1", "magnitude", "correctness", "share",
            "sink", "detectors-before", "detectors-after", "shift",
        ]  # fmt: skip
        assert found["figures"][6]["caption"].startswith("tiny on mails.csv; k = 4; n = 64 prompts")

    def test_quiet_says_nothing(self, folder: Path) -> None:
        result = invoke("plot", folder, "--only", "shift,confusion", "--format", "svg", "--quiet")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
        assert (folder / "figures" / "shift.svg").exists()

    def test_another_run_beside(self, folder: Path, tmp_path: Path) -> None:
        other = write_run(tmp_path / "other", kind="end_to_end", updates=[update(1)])
        result = invoke("plot", folder, "--beside", other, "--only", "training", "--format", "svg")
        assert result.exit_code == 0, result.stderr
        svg = (folder / "figures" / "training.svg").read_text(encoding="utf-8")
        assert ">end_to_end</text>" in svg
        assert f"note: {other} holds no heads.npz" in result.stdout

    def test_the_same_files_make_the_same_bytes(self, folder: Path, tmp_path: Path) -> None:
        made = []
        for name in ("one", "two"):
            out = tmp_path / name
            assert invoke("plot", folder, "--only", "attention", "--output", out).exit_code == 0
            made.append({path.name: path.read_bytes() for path in out.iterdir()})
        assert made[0] == made[1]
        assert len(made[0]) == 2


class TestStudy:
    def test_a_file_compressed_or_not(self, tmp_path: Path, cells: list[dict]) -> None:
        analysis.write_study(tmp_path / "made", study(figures=["accuracy"]), cells)
        text = (tmp_path / "made" / "study.json").read_bytes()
        packed = tmp_path / "claims.json.gz"
        packed.write_bytes(gzip.compress(text))
        first = document(invoke("plot", packed, "--format", "svg", "--json"))
        assert first["output"] == str(tmp_path / "claims-figures")
        second = document(invoke("plot", tmp_path / "made", "--format", "svg", "--json"))
        assert second["output"] == str(tmp_path / "made")
        stems = ["accuracy-demo", "training-demo", "confusion-demo-sst2", "reliability-demo-sst2"]
        for found, out in ((first, tmp_path / "claims-figures"), (second, tmp_path / "made")):
            assert found["kind"] == "study"
            assert [one["files"] for one in found["figures"]] == [
                [str(out / f"{stem}.svg")] for stem in stems
            ]
            assert found["notes"] == []
        svg = (tmp_path / "made" / "confusion-demo-sst2.svg").read_text(encoding="utf-8")
        assert ">eggs</text>" in svg

    def test_cells_of_a_study_that_is_not_done(self, tmp_path: Path, cells: list[dict]) -> None:
        (tmp_path / "s" / "cells").mkdir(parents=True)
        for one in cells[:2]:
            path = tmp_path / "s" / "cells" / f"{one['id']}.json"
            path.write_text(json.dumps(one), encoding="utf-8")
        (tmp_path / "s" / "study.yaml").write_text("name: s\nfigures: [accuracy]\n")
        result = invoke("plot", tmp_path / "s", "--list")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.splitlines() == [
            "accuracy: accuracy-demo", "training: training-demo",
            "confusion: confusion-demo-sst2", "reliability: reliability-demo-sst2",
        ]  # fmt: skip

    def test_cells_made_before_there_were_bins(self, tmp_path: Path, cells: list[dict]) -> None:
        for one in cells:
            del one["evaluation"]["methods"]["vanilla"]["reliability"]
        analysis.write_study(tmp_path, study(), cells)
        result = invoke("plot", tmp_path, "--list")
        assert result.stdout.splitlines()[-1] == (
            "note: figure reliability: its cells were made before eval kept the bins of the "
            "calibration error; run the study again"
        )

    def test_a_figure_that_the_study_does_not_name(self, tmp_path: Path) -> None:
        analysis.write_study(tmp_path, study(), [cell("abft", seed=1, run=run([4.0, 3.0]))])
        result = invoke("plot", tmp_path, "--only", "head_count,grid", "--list")
        assert result.stdout.splitlines() == [
            "head_count: head-count-demo",
            "note: figure grid: no cell that is done measured what it shows",
        ]


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["--only", "pie"], "--only pie: no figure is called that; there are training, "),
            (["--format", "gif"], "--format gif: 'gif' is none of svg, png, pdf"),
            (["--only", "confusion"], "there is nothing to draw: confusion: not drawn: "),
            (["--beside", "nowhere"], "nowhere: holds no run (no run.json)"),
            (["--width", "poster"], "poster"),
        ],
    )
    def test_one_line_and_status_2(self, folder: Path, arguments: list[str], told: str) -> None:
        result = invoke("plot", folder, *arguments)
        assert result.exit_code == 2
        assert told in result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert not (folder / "figures").exists()

    def test_what_is_no_run_and_no_study(self, tmp_path: Path, folder: Path) -> None:
        (tmp_path / "list.json").write_text("[]")
        (tmp_path / "text.gz").write_bytes(b"\x1f\x8bno")
        (tmp_path / "old.json").write_text('{"schema": 9, "cells": []}')
        (tmp_path / "bad.json").write_text('{"schema": 1, "cells": [{"model": 3}]}')
        for name, told in (
            ("nowhere", "there is no such file or folder"),
            (".", "holds neither a run (run.json) nor a study"),
            ("list.json", "is no study's facts"),
            ("text.gz", "cannot be read"),
            ("old.json", "is of schema 9 and this abft-mlx reads 1"),
            ("bad.json", "bad.json: cannot be read (cells.0.id: Field required)"),
        ):
            result = invoke("plot", tmp_path / name)
            assert result.exit_code == 2, name
            assert told in result.stderr
            assert len(result.stderr.splitlines()) == 1
        result = invoke("plot", tmp_path / "old.json", "--beside", folder)
        assert "only a run has states" in result.stderr

    def test_a_broken_file_of_a_run(self, folder: Path) -> None:
        (folder / "heads.npz").write_bytes(b"none")
        result = invoke("plot", folder, "--json")
        assert result.exit_code == 2
        assert "heads.npz: is no file of heads" in document(result)["error"]["message"]

    def test_an_output_that_is_a_file(self, folder: Path) -> None:
        result = invoke("plot", folder, "--only", "shift", "--output", folder / "run.json")
        assert result.exit_code == 2
        assert f"{folder / 'run.json'}: cannot be written" in result.stderr

    def test_without_matplotlib(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = invoke("plot", folder)
        assert result.exit_code == 2
        assert "pip install 'abft-mlx[plots]'" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (folder / "figures").exists()


def test_heads_of_a_model_that_no_run_trained(tmp_path: Path) -> None:
    seen = heads(states=("before",), detected=True)
    facts = {"model": "/a/b/tiny", "data": "x", "k": 3}
    write_heads(tmp_path / "seen.npz", replace(seen, facts=facts))
    result = invoke("plot", tmp_path / "seen.npz", "--format", "svg", "--json")
    assert result.exit_code == 0, result.stderr
    told = document(result)
    assert [one["name"] for one in told["figures"]] == [
        "label_attention", "attention", "magnitude", "correctness", "share", "sink", "detectors",
    ]  # fmt: skip
    assert told["notes"] == []
    assert told["figures"][0]["caption"].startswith("tiny on x; k = 3; n = 64 prompts")
    assert "seed" not in told["figures"][0]["caption"]
    assert (tmp_path / "seen-figures" / "magnitude.svg").is_file()
    wrong = invoke("plot", tmp_path / "seen.npz", "--only", "training")
    assert wrong.exit_code == 2
    assert "no figure is called that; there are label_attention" in wrong.stderr
    (tmp_path / "seen.npz").write_bytes(b"PK")
    wrong = invoke("plot", tmp_path / "seen.npz")
    assert wrong.exit_code == 2
    assert "seen.npz: is no file of heads" in wrong.stderr


def test_measured_before_and_after(folder: Path) -> None:
    (folder / "eval.json").write_text(json.dumps(evaluation(COUNTS, COUNTS)), encoding="utf-8")
    result = invoke("plot", folder, "--only", "confusion,reliability", "--json", "--format", "svg")
    assert [one["name"] for one in document(result)["figures"]] == ["confusion", "reliability"]
    assert document(result)["notes"] == []
