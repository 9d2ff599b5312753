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
from abft_mlx.study.plan import Cell
from abft_mlx.study.sections import Study

# Of a cell's file.
SCHEMA = 1
DONE, FAILED = "done", "failed"
STUDY_FILE = "study.yaml"
# Of a recipe's settings, the one that changes nothing that is measured.
_FREE = frozenset({"description"})


class Store:
    """A folder that belongs to one study.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = path / "cells"
        self.running = path / "running"

    def scratch(self, cell: Cell) -> Path:
        """Where a cell works; it is there as long as the cell is begun and not finished."""
        return self.running / cell.id

    def adapter(self, cell: Cell) -> Path:
        """Where a cell's adapter is kept."""
        return self.path / "adapters" / cell.id

    def open(self, study: Study, found: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Make the folder and write the study into it, unless it belongs to another.

        Returns:
            The documents that lie here, by id; see `check`.

        Raises:
            OutputError: it holds another study or cells of another, or cannot be written.
        """
        self._check_name(study)
        held = self.check(found)
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.write_failure(self.path, error) from error
        text = to_yaml(study.model_dump(mode="json", exclude_defaults=True))
        files.write_text(self.path / STUDY_FILE, text)
        return held

    def _check_name(self, study: Study) -> None:
        """See that the folder holds this study or none."""
        path = self.path / STUDY_FILE
        try:
            held = parse(path.read_text(encoding="utf-8"), str(path)).get("name")
        except FileNotFoundError:
            if self.path.is_dir() and not self.cells.is_dir() and any(self.path.iterdir()):
                raise OutputError(
                    f"{self.path}: holds files and no study; choose another --output"
                ) from None
            return
        except NotADirectoryError:
            raise OutputError(f"{self.path}: is a file; choose a folder with --output") from None
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            raise OutputError(f"{path}: cannot be read ({error})") from None
        if held != study.name:
            raise OutputError(
                f"{self.path}: holds study {held}, not {study.name}; choose another --output"
            )

    def write(self, document: dict[str, Any]) -> None:
        """Write a cell's file, whole or not at all."""
        files.write_json(self.cells / f"{document['id']}.json", document)

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's document, or None if it has none.

        Raises:
            OutputError: its file cannot be read.
        """
        path = self.cells / f"{cell.id}.json"
        return _read(path) if path.exists() else None

    def check(self, found: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """The documents that lie here, by id, if their cells are done as this study has them.

        Raises:
            OutputError: a finished cell was made with another recipe.
        """
        held = {}
        for cell in found:
            document = self.read(cell)
            if document is None:
                continue
            held[cell.id] = document
            if document.get("status") == DONE:
                changed = difference(cell, document)
                if changed:
                    raise OutputError(
                        f"{self.path}: cell {cell.id} was made with {changed}; set it back, delete "
                        "the cell's file, or choose another --output"
                    )
        return held


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Every cell's document in a study's folder, by id.

    Raises:
        OutputError: there is no study, or a file cannot be read.
    """
    cells = Path(folder) / "cells"
    if not cells.is_dir():
        raise OutputError(f"{folder}: holds no study (no folder called cells)")
    found = [_read(path) for path in cells.glob("*.json") if not path.name.startswith(".")]
    return sorted(found, key=lambda document: document["id"])


def _read(path: Path) -> dict[str, Any]:
    """A cell's document."""
    try:
        document = files.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path}: cannot be read ({error}); delete it to run the cell again"
        ) from None
    if isinstance(document, dict):
        again = "delete it to run the cell again"
        problem = files.schema_problem(document.get("schema"), SCHEMA, again)
        if problem:
            raise OutputError(f"{path}: {problem}")
    good = isinstance(document, dict) and document.get("status") in (DONE, FAILED)
    if not good or document.get("id") != path.stem:
        raise OutputError(f"{path}: is no cell of a study; delete it to run the cell again")
    return document


def difference(cell: Cell, document: dict[str, Any]) -> str | None:
    """The first setting in which a document's cell differs from a study's, in words."""
    ours: dict[str, Any] = {"": cell.recipe, **cell.axes}
    held = {"": document.get("recipe"), **document.get("axes", {})}
    if set(ours) != set(held):
        return f"the axes {sorted(set(held) - {''})}"
    for name, recipe in ours.items():
        try:
            before = Recipe.model_validate(held[name])
        except ValidationError:
            return "settings that this version of abft-mlx does not know"
        for key, was, now in _differences(before.model_dump(), recipe.model_dump(), ""):
            of = f" of {name}" if name else ""
            return f"{key} {problems.short(was)}{of}, and the study now has {problems.short(now)}"
    factors = list(cell.factors)
    if document.get("factors", []) != factors:
        return f"factors {document.get('factors', [])}, and the study now has {factors}"
    if document.get("like") != cell.like:
        return f"method {document.get('like')}, and the study now has {cell.like}"
    return None


def _differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Every setting that differs: its key and both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            if name not in _FREE:
                inner = f"{key}.{name}" if key else name
                yield from _differences(before.get(name), after.get(name), inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for n, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _differences(one, other, f"{key}.{n}")
    elif before != after:
        yield key, before, after
