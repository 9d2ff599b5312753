"""Every recipe that ships: read by the real loader, and as complete as its users need it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from paper_sets import SETS as PAPER

from abft_mlx import data, recipe
from abft_mlx.data.generated import DEMO_TASK, TASKS
from abft_mlx.recipe import Recipe

FOLDER = Path(__file__).parent.parent / "recipes"
ALL = sorted(path for path in FOLDER.rglob("*") if path.is_file())
FILES = [path for path in ALL if FOLDER / "studies" not in path.parents]


def test_the_folder_holds_recipes_alone_and_all_are_shipped() -> None:
    assert FILES
    assert {path.suffix for path in ALL} == {".yaml"}
    names = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES}
    assert names == set(recipe.shipped())
    assert {"demo", "your-data", *PAPER} <= names


def test_recipes_in_folders_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "abft_mlx" / "recipe"
    inner = tmp_path / "recipes" / "more"
    package.mkdir(parents=True)
    inner.mkdir(parents=True)
    (inner / "one.yaml").write_text("name: one\n")
    monkeypatch.setattr("abft_mlx.recipe.files.__file__", str(package / "files.py"))
    assert list(recipe.shipped()) == ["more/one"]
    assert recipe.load("more/one").name == "one"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_how_to_launch_it(path: Path) -> None:
    name = path.relative_to(FOLDER).with_suffix("").as_posix()
    one = recipe.load(name)
    assert recipe.load(path) == one
    assert (one.name, bool(one.description)) == (name, True)
    header = path.read_text(encoding="utf-8").partition("\nname:")[0]
    lines = header.splitlines()
    assert all(line.startswith("#") for line in lines)
    assert any(re.match(r"#   abft-mlx finetune \S+ --output \S+$", line) for line in lines)
    assert "Cost:" in header
    assert "Mac" in header
    # The safe loader that everyone else uses reads the same.
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert Recipe.model_validate({k: {} if v is None else v for k, v in values.items()}) == one


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_are_the_papers(name: str, shared: Path) -> None:
    facts = json.loads((shared / "data" / "datasets.json").read_text())[name]
    one = recipe.load(name)
    assert one.data.labels == facts["labels_paper"]
    for key, value in facts["prompt"].items():
        expected = value.removesuffix(" ") if key == "label_prefix" else value
        assert getattr(one.prompt, key) == expected
    assert one.prompt.label_words is None
    assert one.data.source in facts["source_hf_dataset"] or one.data.source == "nyu-mll/glue"
    assert one.data.training_rows == facts["split_sizes"]["calibration"]
    assert one.data.demonstration_rows == facts["split_sizes"]["demonstration"]
    assert one.data.test_rows == facts["split_sizes"]["test"]
    assert one.data.staicc_order
    texts = data.load(one.data.model_copy(update={"source": str(shared / "data" / facts["file"])}))
    assert len(texts) == facts["size"]
    assert list(texts.class_counts().values()) == list(facts["class_histogram"].values())


GENERATED = {path.stem: f"generated/{path.stem}" for path in FOLDER.glob("generated/*.yaml")}


@pytest.mark.parametrize(("task", "name"), [("demo", "demo"), *sorted(GENERATED.items())])
def test_generated_recipes_use_the_tasks_own_template(task: str, name: str) -> None:
    one = recipe.load(name)
    assert (one.model, one.data.source) == ("demo", task)
    own = TASKS[DEMO_TASK if task == "demo" else task]
    assert one.prompt.input_prefix == own.input_prefix
    assert one.prompt.label_prefix == own.label_prefix
    assert one.training == recipe.load("demo").training


def test_your_data_shows_every_setting_at_its_default() -> None:
    text = (FOLDER / "your-data.yaml").read_text(encoding="utf-8")
    shown = re.sub(r"^( *)#(\w+:)", r"\1\2", text, flags=re.MULTILINE)
    values = yaml.safe_load(shown)
    default = recipe.default().model_dump()
    assert set(values) == set(default)
    for section, inner in default.items():
        if isinstance(inner, dict):
            assert set(values[section]) == set(inner), section
    assert recipe.loads(shown) == recipe.load("your-data")
    commented = set(re.findall(r"^ *#(\w+):", text, flags=re.MULTILINE))
    assert {"prompts_per_update", "labels", "rank"} <= commented
