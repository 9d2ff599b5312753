"""Study files and their cells: what is read, what is refused, which recipe each cell gets."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from abft_mlx import data, study
from abft_mlx.errors import RecipeError

GRID = """
name: grid
models: [demo]
tasks: [generated/emotion, generated/purpose]
methods: [contextual, abft]
seeds: [1, 2]
"""


def cells(text: str) -> dict[str, study.Cell]:
    return {cell.id: cell for cell in study.cells(study.loads(text))}


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        study.cells(study.loads(text))
    message = str(caught.value)
    assert "\n" not in message
    return message


def one(methods: str, more: str = "", tasks: str = "[generated/emotion]") -> list[study.Cell]:
    """The cells of a study of the demo model with these methods and more keys."""
    text = f"name: s\nmodels: [demo]\ntasks: {tasks}\nmethods: {methods}\n{more}\n"
    return study.cells(study.loads(text))


def test_a_grid_in_order() -> None:
    assert list(cells(GRID)) == [
        "demo--generated-emotion--untrained",
        "demo--generated-purpose--untrained",
        "demo--generated-emotion--abft--1",
        "demo--generated-purpose--abft--1",
        "demo--generated-emotion--abft--2",
        "demo--generated-purpose--abft--2",
    ]


def test_what_is_not_trained_is_one_cell() -> None:
    (cell,) = one("[knn, zero_shot, batch]", "seeds: [1, 2, 3]")
    assert (cell.method, cell.kind, cell.seed) == ("untrained", "predict", None)
    assert cell.recipe.evaluation.methods == ["vanilla", "knn", "zero_shot", "batch"]


def test_a_changed_way_of_predicting_has_a_cell_of_its_own() -> None:
    found = one("[vanilla, {name: few, like: contextual, settings: [evaluation.queries=9]}]")
    assert [cell.method for cell in found] == ["untrained", "few"]
    assert found[1].recipe.evaluation.methods == ["vanilla", "contextual"]
    assert (found[0].recipe.evaluation.queries, found[1].recipe.evaluation.queries) == (512, 9)


METHODS = {
    "abft": ("abft", False, True, True, 0.5, 1.0),
    "end_to_end": ("end_to_end", True, True, True, 0.5, 1.0),
    "end_to_end_qk": ("end_to_end", False, True, True, 0.5, 1.0),
    "no_pid": ("abft", False, False, True, 0.5, 1.0),
    "no_filter": ("abft", False, False, False, 0.5, 1.0),
    "no_punish": ("abft", False, False, True, 0.0, 1.0),
    "no_reward": ("abft", False, False, True, 0.5, 0.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_built_in_methods_are_the_papers(name: str) -> None:
    (cell,) = one(f"[{name}]")
    objective = cell.recipe.objective
    found = (objective.kind, cell.recipe.adapter.head, objective.pid, objective.filter)
    assert (*found, objective.punish, objective.reward) == METHODS[name]
    assert cell.recipe.mixture == []
    assert (cell.kind, cell.like) == ("train", name)
    assert cell.recipe.evaluation.methods == ["vanilla"]


def test_mixtures_are_all_other_tasks() -> None:
    found = one("[metaicl]", tasks="[generated/emotion, generated/purpose, trec]")
    assert [[other.name for other in cell.recipe.mixture] for cell in found] == [
        ["generated/purpose", "trec"], ["generated/emotion", "trec"],
        ["generated/emotion", "generated/purpose"],
    ]  # fmt: skip
    assert found[2].recipe.mixture[0].prompt.input_prefix == "diary: "
    assert found[2].recipe.data.source == "CogComp/trec"
    assert {(c.recipe.objective.kind, c.recipe.adapter.head) for c in found} == {
        ("end_to_end", True)
    }  # fmt: skip
    swept = one("[metaicl]", "sweep: {prompt.demonstrations: [2]}", "[demo, trec]")
    assert [cell.recipe.mixture[0].prompt.demonstrations for cell in swept] == [2, 2]


def test_transfer_is_to_all_other_tasks() -> None:
    found = one("[vanilla, abft]", "protocols: [accuracy, transfer]", "[generated/emotion, trec]")
    for cell in found:
        assert cell.recipe.evaluation.protocols == ["accuracy", "transfer"]
        (other,) = cell.recipe.evaluation.transfer
        assert {cell.task, other.name} == {"generated/emotion", "trec"}
    assert one("[abft]", tasks="[generated/emotion, trec]")[0].recipe.evaluation.transfer == []


def test_later_settings_win() -> None:
    text = """
name: s
models: [{name: m, model: demo, settings: [training.updates=2, adapter.rank=2, adapter.scale=2]}]
tasks: [{name: t, recipe: generated/emotion, settings: [adapter.rank=3, adapter.scale=3]}]
methods: [abft, {name: mine, like: no_pid, settings: [adapter.scale=4, objective.punish=0.1]}]
settings: [training.updates=1, training.examples=9, adapter.dropout=0.1]
"""
    abft, mine = study.cells(study.loads(text))
    assert (abft.model, abft.task, abft.recipe.model, abft.recipe.name) == ("m", "t", "demo", "t")
    for cell in (abft, mine):
        assert cell.recipe.training.examples == 9
        assert cell.recipe.training.updates == 2
        assert (cell.recipe.adapter.rank, cell.recipe.adapter.dropout) == (3, 0.1)
    assert (abft.recipe.adapter.scale, mine.recipe.adapter.scale) == (3, 4)
    assert (mine.method, mine.like, mine.recipe.objective.punish) == ("mine", "no_pid", 0.1)
    assert not mine.recipe.objective.pid


def test_a_models_revision_is_not_the_recipes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: a/b\nrevision: old\n", encoding="utf-8")
    text = f"models: [a/b, demo, {{model: a/b, name: new, revision: x}}]\ntasks: [{mine}]\n"
    found = study.cells(study.loads(f"name: s\n{text}methods: [abft]"))
    assert [(cell.recipe.model, cell.recipe.revision) for cell in found] == [
        ("a/b", "old"), ("demo", None), ("a/b", "x"),
    ]  # fmt: skip
    assert {cell.task for cell in found} == {"mine"}


def test_a_sweep_multiplies_cells() -> None:
    found = one(
        "[vanilla, abft, no_pid]",
        "sweep: {objective.punish: [0, 0.5], objective.reward: [1, 2]}\nseeds: [3, 4]",
    )
    assert len(found) == 1 + 2 * 4 * 2
    (punished,) = (c for c in found if c.id.endswith("no_pid--objective.punish=0.5"
                                                     "--objective.reward=2--4"))  # fmt: skip
    assert punished.sweep == {"objective.punish": 0.5, "objective.reward": 2}
    assert (punished.recipe.objective.punish, punished.recipe.objective.reward) == (0.5, 2)
    assert found[0].sweep == {}


def test_a_method_may_be_swept_alone() -> None:
    found = one("[abft, {like: end_to_end, sweep: {training.learning_rate: [1e-4, 1e-3]}}]")
    assert [(c.method, c.recipe.training.learning_rate) for c in found] == [
        ("abft", 1e-3), ("end_to_end", 1e-4), ("end_to_end", 1e-3),
    ]  # fmt: skip


SIZES = "sweep: {training.examples: [32, 50, 1024]}"


def test_training_sizes_are_passed_over_twice() -> None:
    found = one("[abft]", SIZES)
    assert [cell.recipe.training.examples for cell in found] == [32, 50, 1024]
    assert [cell.recipe.training.updates for cell in found] == [2, 4, 64]
    small = one("[abft]", f"{SIZES}\nsettings: [training.prompts_per_update=8]")
    assert [cell.recipe.training.updates for cell in small] == [8, 13, 256]
    fixed = one("[{like: abft, settings: [training.updates=5]}]", SIZES)
    assert [cell.recipe.training.updates for cell in fixed] == [5, 5, 5]


def test_a_plane_has_both_recipes() -> None:
    (cell,) = one(
        "[{like: plane, axes: [abft, mine], settings: [training.updates=3]},"
        " {name: mine, like: end_to_end, settings: [adapter.rank=2, training.updates=9]}]"
    )[:1]
    assert list(cell.axes) == ["abft", "mine"]
    assert cell.recipe == cell.axes["abft"]
    assert cell.recipe.objective.kind == "abft"
    assert (cell.axes["mine"].objective.kind, cell.axes["mine"].adapter.rank) == ("end_to_end", 2)
    assert {one.training.updates for one in cell.axes.values()} == {3}
    assert {one.training.seed for one in cell.axes.values()} == {42}
    assert cell.factors == (-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)


@pytest.mark.parametrize("source", ["generated/emotion", "demo"])
def test_extrapolation_keeps_the_protocols_test_rows(source: str) -> None:
    (plain,) = one("[abft]", tasks=f"[{source}]")
    (cell,) = one("[{like: extrapolate, factors: [1, 3]}]", tasks=f"[{source}]")
    rows = [data.split(data.load(c.recipe.data), c.recipe.data).rows for c in (plain, cell)]
    assert (cell.recipe.data.training_rows, cell.recipe.data.validation_rows) == (768, 256)
    assert rows[0]["test"] == rows[1]["test"]
    assert rows[0]["demonstrations"] == rows[1]["demonstrations"]
    assert rows[1]["training"] + rows[1]["validation"] == rows[0]["training"]
    assert cell.recipe.training.validation_prompts == 512
    assert cell.factors == (1, 3)


def test_ids_are_safe_and_tell_cells_apart() -> None:
    text = "name: s\nmodels: ['a/b--c d']\ntasks: [demo]\nmethods: [{name: é/x, like: abft}]\n"
    (found,) = cells(text)
    assert found == "a-b-c-d--demo--x--42"
    assert study.cell_id("a", "-.", 3) == "a-----3"
    long = [study.cell_id("m" * 300, "t", seed) for seed in (1, 2)]
    assert long[0] != long[1]
    assert all(len(one) < 200 for one in long)


def test_ids_that_would_be_one_are_refused() -> None:
    text = GRID.replace("models: [demo]", "models: [a/b, A-b]")
    assert "two cells have the id A-b--generated-emotion--untrained" in refused(text)


@pytest.mark.parametrize("of", [1, 3])
def test_shards_share_every_kind_of_cell(of: int) -> None:
    text = GRID.replace("seeds: [1, 2]", "seeds: [1, 2, 3, 4, 5]").replace(
        "methods: [contextual, abft]", "methods: [vanilla, abft, end_to_end, no_pid]"
    )
    found = study.cells(study.loads(text))
    shards = [study.shard(found, n, of) for n in range(1, of + 1)]
    assert sorted(c.id for one in shards for c in one) == sorted(c.id for c in found)
    for method, count in Counter(cell.method for cell in found).items():
        shares = [sum(cell.method == method for cell in one) for one in shards]
        assert max(shares) - min(shares) <= 1, method
        assert sum(shares) == count
    assert shards == [study.shard(study.cells(study.loads(text)), n, of) for n in range(1, of + 1)]
    positions = [[found.index(cell) for cell in one] for one in shards]
    assert positions == [sorted(one) for one in positions]


START = "name: s\nmodels: [demo]\n"
BAD = {
    "- a": "study: a study is a map of keys, this is ['a']",
    "models: [demo]": "study: tasks is missing (and 1 more: methods is missing)",
    GRID + "method: x": "study: unknown key method (value 'x'); did you mean methods?",
    GRID.replace("abft]", "abtf]"): "methods.1.like is 'abtf': no built-in method; did you "
    "mean abft?",
    GRID.replace("[1, 2]", "[1, 1]"): "seeds is [1, 1]: 1 occurs twice",
    GRID + "protocols: [acuracy]": "protocols is 'acuracy': ",
    GRID + "settings: [training.seed=3]": "training.seed is what seeds sets",
    GRID + "settings: [updates=3]": "'updates=3' is no setting; write section.key",
    GRID + "settings: [training.updates]": "'training.updates' is no setting; write section.key=",
    GRID + "settings: [training.updatse=3]": "model demo, task generated/emotion: setting: "
    "unknown key training.updatse (value 3); did you mean updates?",
    GRID + "sweep: {training.updates: []}": "training.updates has no values",
    GRID + "sweep: {training.updates: [1, 1]}": "1 occurs twice",
    GRID + "sweep: {training.updates: [0]}": "method abft: setting: ",
    GRID.replace("/purpose", "/porpoise"): "study grid: task generated/porpoise: "
    "'generated/porpoise' is no run folder here and no recipe: did you mean generated/purpose?",
    START + "tasks: [demo]\nmethods: [plane]": "plane needs two axes",
    START + "tasks: [demo]\nmethods: [{like: abft, axes: [a, b]}]": "abft, which takes no axes",
    START + "tasks: [demo]\nmethods: [{like: plane, axes: [abft, knn]}]": "method plane has the "
    "axis 'knn', which is no method that trains",
    START + "tasks: [demo]\nmethods: [{name: untrained, like: abft}]": "untrained is what",
    START + "tasks: [demo]\nmethods: [metaicl]": "method metaicl trains on the study's other tasks",
    START + "tasks: [demo]\nmethods: [abft]\nprotocols: [transfer]": "there is only demo",
    START + "tasks: [demo, {recipe: trec, settings: [prompt.demonstrations=2]}]\n"
    "methods: [metaicl]":
        "task demo, method metaicl: mixture: trec has 2 demonstrations, the recipe 4",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_mistakes_are_one_line(text: str) -> None:
    assert BAD[text] in refused(text)


def test_studies_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GRID.replace("name: grid\n", ""), encoding="utf-8")
    assert study.load(path).name == "mine"
    shipped = {"table1": path}
    monkeypatch.setattr("abft_mlx.study.plan.recipe_files.studies", lambda: shipped)
    assert study.load("table1") == study.load(str(path))
    for name, words in {
        "tabel1": "no study is called 'tabel1': did you mean table1? Shipped are table1; ",
        "trec": "trec is a recipe, for abft-mlx finetune",
        "no/such.yaml": "no/such.yaml: no such file",
    }.items():
        with pytest.raises(RecipeError, match=re.escape(words)):
            study.load(name)
