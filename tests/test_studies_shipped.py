"""Every study that ships: it loads, its cells resolve, and it is what the paper did."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from abft_mlx import recipe, study
from abft_mlx.analysis import STUDY_FIGURES
from abft_mlx.analysis.study_data import paper_model, paper_row, paper_targets

FOLDER = Path(__file__).parent.parent / "recipes" / "studies"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TABLES = ("table1", "table2", "table3", "table4")
PAPER = [name for name in NAMES if not name.startswith(("claims-", "small", "modes"))]
TEN_BILLION = 10e9


@functools.cache
def cells_of(name: str) -> list:
    return study.cells(study.load(name))


def billions(text: str) -> float:
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


@pytest.mark.parametrize("name", NAMES)
def test_every_study_resolves_and_says_how_to_launch_it(name: str) -> None:
    one = study.load(name)
    assert (one.name, bool(one.description)) == (name, True)
    cells = cells_of(one.name)
    assert len({cell.id for cell in cells}) == len(cells) > 0
    assert set(one.figures) <= set(STUDY_FIGURES)
    assert one.figures
    assert one.paper.get("table", "table1") in TABLES
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    header = text.partition("\nname:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"\n#   abft-mlx study {name} --output runs/{name}\n" in header
    assert "Cost:" in header
    assert "Mac" in header
    assert {entry.recipe for entry in one.tasks} <= set(recipe.shipped())


@pytest.mark.parametrize("name", PAPER)
def test_models_seeds_and_rates_are_the_papers(name: str) -> None:
    one, facts = study.load(name), paper_targets()
    single_run = name in ("figure7", "figure9")
    for model in one.models:
        assert facts["model_ids"][model.name] == model.model
        large = billions(facts["parameters"][model.name]) > TEN_BILLION
        assert len(one.seeds) == (1 if single_run else 2 if large else 4)
    for cell in cells_of(one.name):
        for made in [cell.recipe, *cell.axes.values()]:
            rate = {"lora": 1e-4, "full": 2e-5}[made.adapter.kind]
            assert made.training.learning_rate == rate
            assert made.adapter.rank == 16
            assert made.prompt.demonstrations == 4
            assert made.evaluation.calibration_prompts == 512
            assert (made.evaluation.queries, made.evaluation.repeats) == (512, 2)
            assert made.training.prompts_per_update == 32
            if not cell.sweep:
                assert (made.training.examples, made.training.updates) == (512, 32)
                if cell.method in ("abft", "no_pid"):
                    assert (made.objective.punish, made.objective.reward) == (0.5, 1.0)
                    assert made.objective.pid == (cell.method == "abft")


@pytest.mark.parametrize("table", TABLES)
def test_the_models_of_a_table_are_the_papers(table: str) -> None:
    files = [study.load(name) for name in NAMES if name.partition("-")[0] == table]
    ours = [model.name for one in files for model in one.models]
    assert sorted(ours) == sorted(paper_targets()[table])
    for one in files:
        assert one.paper == {"table": table}
        assert {task.name for task in one.tasks} == set(paper_targets()["tasks"])
        methods = {
            "untrained" if m.name in ("vanilla", "contextual") else m.name for m in one.methods
        }
        known = {"table1": {"abft"}, "table2": {"abft", "end_to_end", "end_to_end_qk"},
                 "table3": {"abft"},
                 "table4": {"abft", "no_pid", "no_filter", "no_punish", "no_reward"}}  # fmt: skip
        assert methods - {"untrained"} == known[table]
        protocols = {"table2": {"accuracy", "transfer"}, "table3": {"accuracy", "robustness"}}
        assert set(one.protocols) == protocols.get(table, {"accuracy"})


def test_grid_and_planes() -> None:
    cells = cells_of("figure6")
    for method in ("abft", "no_pid"):
        pairs = {(cell.recipe.objective.punish, cell.recipe.objective.reward)
                 for cell in cells if cell.method == method}  # fmt: skip
        assert len(pairs) == 20
        assert {(0, 1.0), (0.5, 0), (0.5, 1.0)} <= pairs
    for name, axes in (("figure7", ["abft", "end_to_end_qk"]), ("figure9", ["abft", "metaicl"])):
        planes = [cell for cell in cells_of(name) if cell.kind == "plane"]
        assert planes
        for cell in planes:
            assert list(cell.axes) == axes
            assert (min(cell.factors), max(cell.factors), len(cell.factors)) == (-0.5, 1.5, 9)


def test_the_checkpoints_that_are_commented_out_load() -> None:
    text = (FOLDER / "table1.yaml").read_text(encoding="utf-8")
    shown = re.sub(r"^  #(- name|  model)", r"  \1", text, flags=re.MULTILINE)
    one = study.loads(shown)
    names = [model.name for model in one.models]
    assert {"GPT2-L PICL", "GPT2-L MetaICL"} <= set(names)
    for name, method in (("GPT2-L PICL", "picl"), ("GPT2-L MetaICL", "metaicl")):
        row = paper_row("table1", paper_model(name, ""), "vanilla")
        assert row == paper_targets()["table1"]["GPT2-L"][method]
