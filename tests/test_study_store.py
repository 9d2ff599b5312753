"""A study's folder: what belongs to it, what is refused, which changes are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from study_support import text

from abft_mlx import study
from abft_mlx.errors import OutputError
from abft_mlx.study.running import plain
from abft_mlx.study.store import difference

NAMES = [
    "demo--generated-emotion--untrained",
    "demo--generated-purpose--untrained",
    "demo--generated-emotion--abft--42",
    "demo--generated-purpose--abft--42",
]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder whose cells were all done, nothing having been measured."""
    opened = study.loads(text())
    store = study.Store(tmp_path / "whole")
    cells = study.cells(opened)
    store.open(opened, cells)
    for cell in cells:
        store.write(plain({**cell.facts(), "status": "done", "error": None}))
    return store.path


CHANGES = {
    "training.updates=2": ("training.updates=3", "training.updates 2, and the study now has 3"),
    "name: small": ("name: large", "holds study small, not large"),
    "methods: [vanilla, abft]": (
        "methods: [vanilla, contextual, abft]",
        "evaluation.methods ['vanilla'], and the study now has ['vanilla', 'contextual']",
    ),
}


@pytest.mark.parametrize("before", CHANGES)
def test_a_changed_study_is_refused(before: str, whole: Path) -> None:
    after, words = CHANGES[before]
    table = (whole / "study.yaml").read_bytes()
    with pytest.raises(OutputError) as caught:
        study.run(study.loads(text().replace(before, after)), whole)
    message = str(caught.value)
    assert words in message
    assert "another --output" in message
    if "holds" not in words:
        assert f"cell {NAMES[0]} was made with " in message
    assert (whole / "study.yaml").read_bytes() == table


def test_more_cells_and_other_descriptions_are_no_change(whole: Path) -> None:
    longer = text("[vanilla, abft, no_pid]", "seeds: [42, 43]\ndescription: more")
    held = study.Store(whole).check(study.cells(study.loads(longer)))
    assert sorted(held) == sorted(NAMES)


def test_files_that_are_no_cells_are_refused(whole: Path, tmp_path: Path) -> None:
    opened = study.loads(text("[vanilla]"))
    wrong = f'{{"id": "{NAMES[0]}", "status": "half"}}'
    for content in ('{"id": "x"', "[]", '{"id": "x", "status": "done"}', wrong, "\xff"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "cells").mkdir(parents=True)
        (folder / "cells" / f"{NAMES[0]}.json").write_text(content, encoding="latin-1")
        with pytest.raises(OutputError, match=r"delete it to run the cell again"):
            study.run(opened, folder)
    with pytest.raises(OutputError, match="holds no study"):
        study.read(tmp_path)
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(OutputError, match="holds files and no study"):
        study.run(opened, tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        study.run(opened, tmp_path / "letter.txt")
    cell = study.read(whole)[0]
    cell["recipe"]["training"]["epochs"] = 3
    planned = {one.id: one for one in study.cells(study.loads(text()))}
    assert "does not know" in str(difference(planned[cell["id"]], cell))


def test_differences_are_named() -> None:
    (cell,) = study.cells(
        study.loads(
            "models: [demo]\ntasks: [demo]\n"
            "methods: [{name: p, like: plane, axes: [abft, end_to_end], factors: [0, 1]}]"
        )
    )
    document = json.loads(json.dumps(plain(cell.facts())))
    document["recipe"]["description"] = "another"
    assert difference(cell, document) is None
    assert "factors [0.0, 1.0], and the study now has [0.0]" in str(
        difference(replace(cell, factors=(0.0,)), document)
    )
    assert "like 'plane', and the study now has 'abft'" in str(
        difference(replace(cell, like="abft"), document)
    )
    document["axes"]["end_to_end"]["adapter"]["rank"] = 3
    assert difference(cell, document) == "adapter.rank 3 of end_to_end, and the study now has 16"
