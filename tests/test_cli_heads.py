"""``abft-mlx heads``, and the files that heads, eval and demo leave in a run folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from cli_support import document, invoke, train_run

from abft_mlx.induction import read_heads


@pytest.fixture
def run(model: Path, texts: Path, tmp_path: Path) -> Path:
    return train_run(tmp_path / "run", model, texts)


def test_a_model_and_data(model: Path, texts: Path, tmp_path: Path) -> None:
    files = [tmp_path / "heads.npz", tmp_path / "heads.csv"]
    outputs = [word for file in files for word in ("--output", file)]
    found = document(
        invoke("heads", model, "--data", texts, "--prompts", 6, *outputs, "--json", "--quiet")
    )
    assert (found["schema"], found["prompts"], found["k"]) == (1, 6, 4)
    assert found["adapter"] is None
    assert found["labels"] == ["ham", "not spam"]
    (state,) = found["states"].values()
    assert found["files"] == [str(file) for file in files]
    held = read_heads(files[0])
    np.testing.assert_array_equal(held.states["before"].magnitude, state["magnitude"])
    np.testing.assert_array_equal(held.states["before"].sink, state["sink"])
    assert held.states["before"].detected is not None
    np.testing.assert_array_equal(
        held.states["before"].detected.induction, state["detected"]["induction"]
    )
    assert state["heads_per_prompt"] == np.sum(state["share"])
    assert state["agreement"]["count"] == (np.array(state["share"]) >= 0.5).sum()
    with files[1].open(newline="", encoding="utf-8") as lines:
        read = list(csv.DictReader(lines))
    assert [(one["layer"], one["head"]) for one in read] == [
        ("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"),
    ]  # fmt: skip
    assert [float(one["correctness"]) for one in read] == list(np.ravel(state["correctness"]))


def test_a_run_is_seen_before_and_after_and_keeps_it(run: Path) -> None:
    kept = read_heads(run / "heads.npz")
    assert kept.states["after"].detected is None
    found = document(invoke("heads", run, "--prompts", 5, "--json", "--quiet"))
    assert list(found["states"]) == ["before", "after"]
    assert found["k"] == 2
    now = read_heads(run / "heads.npz")
    assert now.prompts == 5
    assert now.states["after"].detected is not None
    assert found["states"]["before"]["magnitude"] != found["states"]["after"]["magnitude"]


def test_an_adapter_on_a_named_model(run: Path, model: Path, texts: Path) -> None:
    own = document(invoke("heads", run, "--prompts", 5, "--json", "--quiet"))
    for words in ((model, "--adapter", run), (model, "--adapter", run, "--data", texts)):
        named = document(invoke("heads", *words, "--prompts", 5, "--json", "--quiet"))
        assert named["states"] == own["states"]
        assert named["files"] == []


def test_a_person_sees_the_heads_in_order(run: Path) -> None:
    result = invoke("heads", run, "--prompts", 5)
    assert result.exit_code == 0, result.stderr
    held = read_heads(run / "heads.npz")
    best = np.maximum(*(one.magnitude for one in held.states.values()))
    order = sorted(np.ndindex(2, 2), key=lambda at: -best[at])
    rows = [line.split() for line in result.stdout.splitlines()]
    shown = [(int(one[0]), int(one[1])) for one in rows if len(one) > 3 and one[2] == "before"]
    assert shown == order
    first = held.states["before"].magnitude[order[0]]
    assert f" before {first:.0%} " in " ".join(result.stdout.split()).replace("  ", " ")
    assert "rank correlation" in result.stdout
    assert f"wrote {run / 'heads.npz'}" in result.stdout.replace("\n", "")
    quiet = invoke("heads", run, "--prompts", 5, "--no-detectors", "--quiet")
    assert "wrote" not in quiet.stdout
    assert "rank correlation" not in quiet.stdout
    assert "induction heads in a prompt" in quiet.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nobody/nothing",), "--data is missing"),
        (("demo", "--output", "heads.txt"), "--output heads.txt: write a name that ends in .npz"),
        (("demo", "--output", "none/heads.npz"), "no such folder: none"),
        (("demo", "--adapter", "none"), "adapter 'none': no such folder"),
        (("demo", "--prompts", "0"), "greater than or equal to 1"),
        (("demo", "--set", "prompt.demonstrations=0"), "prompt.demonstrations"),
        (("demo", "--data", "none.csv"), "none.csv"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str) -> None:
    result = invoke("heads", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


QUICK = ("--set", "evaluation.queries=6", "--set", "evaluation.repeats=1", "--quiet")


def test_eval_keeps_its_document_where_it_describes_the_run(run: Path, tmp_path: Path) -> None:
    kept = run / "eval.json"
    kept.unlink(missing_ok=True)
    assert invoke("eval", "--adapter", run, *QUICK).exit_code == 0
    assert not kept.exists()  # with other settings it says something else than the recipe
    elsewhere = tmp_path / "mine.json"
    shown = document(
        invoke("eval", "--adapter", run, *QUICK, "--output", elsewhere, "--json")
    )  # fmt: skip
    assert json.loads(elsewhere.read_text(encoding="utf-8")) == shown
    assert not kept.exists()
    result = invoke("eval", "--adapter", run, *QUICK, "--output", elsewhere)
    assert result.exit_code == 2
    assert "give --overwrite" in result.stderr
    shown = document(invoke("eval", "--adapter", run, "--json", "--quiet"))
    assert json.loads(kept.read_text(encoding="utf-8")) == shown


def test_eval_that_cannot_keep_its_document_still_shows_it(run: Path) -> None:
    (run / "eval.json").unlink(missing_ok=True)
    (run / "eval.json").mkdir()
    result = invoke("eval", "--adapter", run)
    assert result.exit_code == 0
    assert "with the adapter" in result.stdout
    assert f"note: {run / 'eval.json'}: cannot be written" in result.stdout.replace("\n", "")
