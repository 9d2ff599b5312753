"""Files of each released version are read; files of a newer one are refused with the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_support import document, invoke, write_model, write_texts

from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.files import schema_problem

FIXTURES = Path(__file__).parent / "fixtures"
RELEASES = sorted(one.name for one in FIXTURES.iterdir())
NEWER = "is of schema 2 and this abft-mlx reads 1; update abft-mlx (pip install --upgrade abft-mlx)"


@pytest.fixture(params=RELEASES)
def released(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what a version wrote, with the model and texts that it names beside it."""
    folder = tmp_path / "released"
    shutil.copytree(FIXTURES / request.param, folder)
    write_model(folder / "tiny")
    write_texts(folder / "mail.csv")
    return folder


def test_there_is_a_fixture_of_this_version() -> None:
    from abft_mlx import __version__

    assert __version__ in RELEASES


def test_every_command_reads_a_run_and_a_study(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(released)
    found = recipes.load("run")
    assert (found.model, found.adapter.rank, found.training.updates) == ("tiny", 2, 3)
    figures = document(invoke("plot", "run", "--json"))["figures"]
    names = {figure["name"] for figure in figures}
    assert {"training", "attention", "magnitude", "shift", "confusion"} <= names
    assert invoke("report", "run").exit_code == 0
    before = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    accuracy = f"{before['methods']['vanilla']['accuracy']:.1%}"
    assert accuracy in Path("run/report.html").read_text(encoding="utf-8")
    for command in ("plot", "report"):
        assert invoke(command, "study.json").exit_code == 0
    measured = document(invoke("eval", "--adapter", "run", "--json", "--quiet"))
    assert measured["prompts"] == before["prompts"]
    # The adapter is on the model.
    tuned, base = (state["methods"]["vanilla"] for state in (measured, measured["base"]))
    assert tuned["true_label_probability"] != base["true_label_probability"]


def newer_json(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["schema"] == 1
    path.write_text(json.dumps({**found, "schema": 2}), encoding="utf-8")


def newer_yaml(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("schema: 1\n")
    path.write_text(text.replace("schema: 1", "schema: 2", 1), encoding="utf-8")


def newer_heads(path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    about = json.loads(arrays["about"].tobytes())
    assert about["schema"] == 1
    arrays["about"] = np.frombuffer(json.dumps({**about, "schema": 2}).encode(), dtype=np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("name", "change", "commands"),
    [
        ("run/run.json", newer_json, (["plot"], ["report"], ["finetune", "--resume"])),
        ("run/eval.json", newer_json, (["plot"], ["report", "--no-figures"])),
        ("run/recipe.yaml", newer_yaml, (["plot"], ["report"], ["finetune", "--resume"])),
        ("run/heads.npz", newer_heads, (["plot"], ["report"])),
        ("study.json", newer_json, (["plot"], ["report"])),
    ],
)
def test_newer_files_are_refused_in_one_line(
    released: Path, name: str, change: Callable[[Path], None], commands: tuple[list[str], ...]
) -> None:
    path = released / name
    change(path)
    given = path if path.parent == released else path.parent
    for command in commands:
        result = invoke(*command, given)
        assert result.exit_code == 2, (command, result.stderr)
        assert result.stderr.count("\n") == 1, result.stderr
        assert f"{path}: {NEWER}, or " in result.stderr
        assert result.stdout == ""


def test_a_recipe_of_a_newer_schema_is_refused_wherever_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("schema: 2\nmodel: demo\ndata: {source: mail.csv}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="is of schema 2"):
        recipes.load(path)
    with pytest.raises(RecipeError, match="is of schema 2"):
        recipes.default([f"mixture=['{path}']"])


def test_versions() -> None:
    assert recipes.loads("model: demo") == recipes.loads("schema: 1\nmodel: demo")
    assert [schema_problem(version, 3, "") for version in (None, 1, 2, 3)] == [None] * 4
    for version in (0, -1, "1", 1.0, True, [1]):
        problem = schema_problem(version, 3, "make it again")
        assert problem == f"is of schema {version} and this abft-mlx reads 3; make it again"
