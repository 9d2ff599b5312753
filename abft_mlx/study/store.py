"""The folder of a study: which cells lie in it, and whether they are this study's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from abft_mlx import files
from abft_mlx.errors import OutputError, RecipeError
from abft_mlx.recipe import Recipe, problems
from abft_mlx.recipe.files import parse, to_yaml
from abft_mlx.study.plan import Cell, Study

# Of a cell's file.
SCHEMA = 1
DONE, FAILED = "done", "failed"
STUDY_FILE = "study.yaml"


class Store:
    """A folder that belongs to one study."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = path / "cells"
        self.running = path / "running"

    def scratch(self, cell: Cell) -> Path:
        """Where a cell works; it is there as long as the cell is begun and not finished."""
        return self.running / cell.id

    def open(self, study: Study, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Make the folder and write the study into it; the documents of cells by id (`check`).

        Raises:
            OutputError: it holds another study or cells of another, or cannot be written.
        """
        path = self.path / STUDY_FILE
        try:
            name = parse(path.read_text(encoding="utf-8"), str(path)).get("name")
        except FileNotFoundError:
            name = study.name
            if self.path.is_dir() and not self.cells.is_dir() and any(self.path.iterdir()):
                raise OutputError(
                    f"{self.path}: holds files and no study; choose another --output"
                ) from None
        except NotADirectoryError:
            raise OutputError(f"{self.path}: is a file; choose a folder with --output") from None
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            raise OutputError(f"{path}: cannot be read ({error})") from None
        if name != study.name:
            raise OutputError(
                f"{self.path}: holds study {name}, not {study.name}; choose another --output"
            )
        documents = self.check(cells)
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.write_failure(self.path, error) from error
        files.write_text(path, to_yaml(study.model_dump(mode="json", exclude_defaults=True)))
        return documents

    def write(self, document: dict[str, Any]) -> None:
        """Write a cell's file, whole or not at all."""
        files.write_json(self.cells / f"{document['id']}.json", document)

    def check(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """The documents of these cells by id, if they are done as this study has them.

        Raises:
            OutputError: a file cannot be read, or a finished cell was made with another recipe.
        """
        documents = {}
        for cell in cells:
            path = self.cells / f"{cell.id}.json"
            if not path.exists():
                continue
            document = documents[cell.id] = _read(path)
            changed = difference(cell, document) if document["status"] == DONE else None
            if changed:
                raise OutputError(
                    f"{self.path}: cell {cell.id} was made with {changed}; set it back, delete "
                    "the cell's file, or choose another --output"
                )
        return documents


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Every cell's document in a study's folder, by id.

    Raises:
        OutputError: there is no study, or a file cannot be read.
    """
    cells = Path(folder) / "cells"
    if not cells.is_dir():
        raise OutputError(f"{folder}: holds no study (no folder called cells)")
    paths = (path for path in cells.glob("*.json") if not path.name.startswith("."))
    return sorted(map(_read, paths), key=lambda document: document["id"])


def _read(path: Path) -> dict[str, Any]:
    """A cell's document."""
    again = "delete it to run the cell again"
    try:
        document = files.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); {again}") from None
    if not isinstance(document, dict):
        document = {}
    problem = files.schema_problem(document.get("schema"), SCHEMA, again)
    if problem:
        raise OutputError(f"{path}: {problem}")
    if document.get("status") not in (DONE, FAILED) or document.get("id") != path.stem:
        raise OutputError(f"{path}: is no cell of a study; {again}")
    return document


def difference(cell: Cell, document: dict[str, Any]) -> str | None:
    """The first setting in which a document's cell differs from a study's, in words."""
    try:
        before, after = (
            {
                **{key: facts.get(key) for key in ("like", "factors")},
                **{
                    name: Recipe.model_validate(recipe).model_dump(mode="json")
                    for name, recipe in {"": facts["recipe"], **facts.get("axes", {})}.items()
                },
            }
            for facts in (document, cell.facts())
        )
    except ValidationError:
        return "settings that this version of abft-mlx does not know"
    for keys, was, now in _differences(before, after):
        of = f" of {keys[0]}" if len(keys) > 1 and keys[0] else ""
        name = ".".join(keys[1:] or keys)
        return f"{name} {problems.short(was)}{of}, and the study now has {problems.short(now)}"
    return None


def _differences(
    before: Any, after: Any, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every setting that differs: its keys and both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            if name != "description":  # changes nothing that is measured
                yield from _differences(before.get(name), after.get(name), (*keys, name))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for n, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(*pair, (*keys, str(n)))
    elif before != after:
        yield keys, before, after
