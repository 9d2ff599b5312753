"""``abft-mlx heads``, and the files that heads and eval leave in a run folder."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_support import document, invoke, train_run

from abft_mlx.induction import read_heads


@pytest.fixture(scope="module")
def finished(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs") / "run", model, texts)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_model_and_data(model: Path, texts: Path, tmp_path: Path) -> None:
    files = [tmp_path / "heads.npz", tmp_path / "heads.csv"]
    outputs = [word for file in files for word in ("--output", file)]
    found = document(
        invoke("heads", model, "--data", texts, "--prompts", 6, *outputs, "--json", "--quiet")
    )
    assert (found["schema"], found["prompts"], found["k"], found["adapter"]) == (1, 6, 4, None)
    assert found["labels"] == ["ham", "not spam"]
    assert found["files"] == [str(file) for file in files]
    (state,) = found["states"].values()
    stored = read_heads(files[0]).states["before"]
    assert stored.detected is not None
    for array, listed in (
        (stored.magnitude, state["magnitude"]),
        (stored.sink, state["sink"]),
        (stored.detected.induction, state["detected"]["induction"]),
    ):
        np.testing.assert_array_equal(array, listed)
    assert state["heads_per_prompt"] == np.sum(state["share"])
    assert state["agreement"]["count"] == (np.array(state["share"]) >= 0.5).sum()
    with files[1].open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["layer"] + row["head"] for row in rows] == ["00", "01", "10", "11"]
    assert [float(row["correctness"]) for row in rows] == list(np.ravel(state["correctness"]))


def test_a_run_is_seen_before_and_after_and_keeps_it(run: Path, model: Path, texts: Path) -> None:
    assert read_heads(run / "heads.npz").states["after"].detected is None
    few = ("--prompts", 5, "--json", "--quiet")
    found = document(invoke("heads", run, *few))
    assert (list(found["states"]), found["k"]) == (["before", "after"], 2)
    stored = read_heads(run / "heads.npz")
    assert stored.prompts == 5
    assert stored.states["after"].detected is not None
    assert found["states"]["before"]["magnitude"] != found["states"]["after"]["magnitude"]
    for words in ((run / "recipe.yaml",), (model, "--data", texts)):
        named = document(invoke("heads", *words, "--adapter", run, *few))
        assert (named["states"], named["files"]) == (found["states"], [])


def test_a_person_sees_the_heads_in_order(run: Path) -> None:
    result = invoke("heads", run, "--prompts", 5)
    assert result.exit_code == 0, result.stderr
    stored = read_heads(run / "heads.npz")
    best = np.maximum(*(state.magnitude for state in stored.states.values()))
    order = sorted(np.ndindex(2, 2), key=lambda at: -best[at])
    rows = [line.split() for line in result.stdout.splitlines()]
    rows = [row for row in rows if len(row) > 3 and row[2] == "before"]
    assert [(int(row[0]), int(row[1])) for row in rows] == order
    assert rows[0][3] == f"{stored.states['before'].magnitude[order[0]]:.0%}"
    assert "rank correlation" in result.stdout
    assert f"wrote {run / 'heads.npz'}" in result.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nobody/nothing",), "--data is missing"),
        (("demo", "--output", "heads.txt"), "--output heads.txt: write a name that ends in .npz"),
        (("demo", "--adapter", "none"), "adapter 'none': no such folder"),
        (("demo", "--prompts", "0"), "'0' for '--prompts'"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str) -> None:
    result = invoke("heads", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_eval_keeps_its_document_where_it_describes_the_run(run: Path, tmp_path: Path) -> None:
    other = ("--set=evaluation.queries=6", "--set=evaluation.repeats=1", "--quiet")
    stored, elsewhere = run / "eval.json", tmp_path / "mine.json"
    stored.unlink(missing_ok=True)
    shown = document(invoke("eval", run, *other, "--output", elsewhere, "--json"))
    assert json.loads(elsewhere.read_text(encoding="utf-8")) == shown
    assert not stored.exists()  # with other settings it says something else than the recipe
    result = invoke("eval", run, *other, "--output", elsewhere)
    assert result.exit_code == 2
    assert "give --overwrite" in result.stderr
    shown = document(invoke("eval", run, "--json", "--quiet"))
    assert json.loads(stored.read_text(encoding="utf-8")) == shown
    stored.unlink(missing_ok=True)
    stored.mkdir()
    result = invoke("eval", run)
    assert result.exit_code == 0
    assert "with the adapter" in result.stdout
    assert f"note: {stored}: cannot be written" in result.stdout.replace("\n", "")
