"""Rows of CSV, JSONL and Parquet files, each with its place; every problem kept, none raised."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abft_mlx.errors import DataError

MISSING = object()
# The row number of a problem that is not the whole file's, though nobody knows which row's.
NOT_UTF8 = -1
MOST_ROWS, MOST_BYTES, BATCH_ROWS = 10_000_000, 2_000_000_000, 4096
UTF16 = (b"\xff\xfe", b"\xfe\xff")
# A text may be longer than the 131,072 characters that csv allows in a field.
csv.field_size_limit(MOST_BYTES)


@dataclass(frozen=True)
class Row:
    """One row as read: its number from 1, where it is, and MISSING where it lacks the column.

    Of a file read for its texts alone ``fields`` has every column: its name and value.
    """

    number: int
    place: str
    text: Any
    label: Any
    fields: tuple[tuple[str, Any], ...] = ()


@dataclass
class Table:
    """What could be read of a file, and what was wrong with it so far.

    Attributes:
        problems: (row number, line) pairs, so that problems found later can be put in order.
        names: class names that the file itself carries, if any.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    names: tuple[str, ...] | None = None


def columns(wanted: str) -> list[str]:
    """The columns that ``sentence|text`` allows, in order of preference."""
    return [name.strip() for name in wanted.split("|") if name.strip()]


def pick(wanted: str, found: Sequence[str]) -> str | None:
    """The first allowed column that exists; upper and lower case differ only where they must."""
    allowed = columns(wanted)
    exact = next((name for name in allowed if name in found), None)
    if exact is not None:
        return exact
    near = [[name for name in found if name.lower() == one.lower()] for one in allowed]
    return next((names[0] for names in near if len(names) == 1), None)


def read(path: Path, text: str, label: str | None) -> Table:
    """Read a file by its ending.

    Args:
        path: of the file.
        text: the columns allowed for texts, as in ``sentence|text``.
        label: the same for labels; None reads texts alone, and every row's label is MISSING.

    Raises:
        DataError: the file cannot be opened, or its kind is unknown.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} are not read; "
            f"use one of {', '.join(READERS)}"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a path is relative to the current folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.strip():
        needs = "a text and a label" if label else "a text"
        return Table(problems=[(0, f"the file is empty; it needs {needs} in each row")])
    return reader(content, text, label)


def _decode(content: bytes, table: Table) -> str:
    """The text of a file, UTF-8 or UTF-16 with its mark; lines that are neither are problems."""
    if content.startswith(UTF16):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            before = content[: error.start].decode("utf-16", errors="replace").count("\n")
            table.problems.append((0, f"line {before + 1} is not UTF-16; save the file as UTF-8"))
            return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                table.problems.append(
                    (
                        NOT_UTF8,
                        f"line {number} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8",
                    )
                )
        return content.decode("utf-8-sig", errors="replace")


def _csv(content: bytes, text: str, label: str | None) -> Table:
    table = Table()
    source = _decode(content, table)
    delimiter = _delimiter(source.lstrip().split("\n", 1)[0], text, label)
    reader = csv.reader(io.StringIO(source, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    where: tuple[int, int | None] | None = None
    number = 0
    try:
        for line, cells in _lines(reader):
            if not header:
                header = [cell.strip() for cell in cells]
                where = _positions(header, text, label, table)
                if where is None:
                    return table
                continue
            number += 1
            place = f"row {number} (line {line})"
            if len(cells) != len(header):
                table.problems.append(
                    (
                        number,
                        f"{place}: {len(cells)} fields where the header has {len(header)}; put "
                        f"quotes around a field that holds {delimiter!r}",
                    )
                )
                if label is None:
                    padded = [*cells, *[""] * (len(header) - len(cells))]
                    fields = tuple(zip(header, padded, strict=False))
                    table.rows.append(Row(number, place, MISSING, MISSING, fields))
            elif where is not None:
                text_at, label_at = where
                value = MISSING if label_at is None else cells[label_at]
                fields = tuple(zip(header, cells, strict=True)) if label is None else ()
                table.rows.append(Row(number, place, cells[text_at], value, fields))
    except csv.Error as error:
        table.problems.append(
            (number + 1, f"row {number + 1} (up to line {reader.line_num}): {error}; check quotes")
        )
    if not number and not table.problems:
        table.problems.append((0, "the file has a header and no rows"))
    return table


def _lines(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the physical line that it starts on."""
    start = 1
    for cells in reader:
        if cells:
            yield start, cells
        start = reader.line_num + 1


def _delimiter(header: str, text: str, label: str | None) -> str:
    """Comma, unless only semicolons or tabs give the columns that are wanted."""
    for delimiter in (",", ";", "\t"):
        found = [cell.strip().strip('"') for cell in header.strip().split(delimiter)]
        if all(pick(wanted, found) for wanted, _ in _wanted(text, label)):
            return delimiter
    return ","


def _wanted(text: str, label: str | None) -> list[tuple[str, str]]:
    """The columns to find, each with the option that names it."""
    return [(text, "--text-column"), *([(label, "--label-column")] if label is not None else [])]


def _positions(
    header: list[str], text: str, label: str | None, table: Table
) -> tuple[int, int | None] | None:
    """Where the columns are in the header; what is wrong with it goes into the table."""
    names = []
    for wanted, option in _wanted(text, label):
        name = pick(wanted, header)
        if name is None:
            table.problems.append((0, no_column(wanted, option, header)))
        elif header.count(name) > 1:
            table.problems.append((0, f"the header names column {name!r} twice"))
        names.append(name)
    places = [header.index(name) for name in names if name is not None]
    if len(places) < len(names):
        return None
    return places[0], places[1] if label is not None else None


def no_column(wanted: str, option: str, found: Sequence[str]) -> str:
    """The line for a column that is not there."""
    setting = "data." + option.removeprefix("--").removesuffix("-column")
    shown = ", ".join(repr(name if len(name) <= 40 else f"{name[:37]}...") for name in found[:12])
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    asked = " or ".join(repr(name) for name in columns(wanted))
    return (
        f"no column {asked}; the columns are {shown or 'none'}{more}: name yours with {option}, or "
        f"as {setting} in a recipe"
    )


def _jsonl(content: bytes, text: str, label: str | None) -> Table:
    table = Table()
    return _json_lines(_decode(content, table), text, label, table)


def _json_lines(source: str, text: str, label: str | None, table: Table) -> Table:
    """A JSON object in every line."""
    lines = enumerate(source.split("\n"), 1)
    filled = [(line_number, line) for line_number, line in lines if line.strip()]
    objects: list[tuple[int, str, Any]] = []
    for number, (line_number, line) in enumerate(filled, 1):
        place = f"row {number}" if number == line_number else f"row {number} (line {line_number})"
        try:
            objects.append((number, place, json.loads(line)))
        except (ValueError, RecursionError) as error:
            table.problems.append((number, f"{place}: not JSON ({_reason(error)})"))
    return _from_objects(objects, text, label, table)


def _json(content: bytes, text: str, label: str | None) -> Table:
    """A JSON array of objects, or JSON Lines by another name."""
    table = Table()
    source = _decode(content, table)
    if not source.lstrip().startswith("["):
        return _json_lines(source, text, label, table)
    try:
        values = json.loads(source)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        table.problems.append((0, f"line {line}: not JSON ({_reason(error)})"))
        return table
    objects = [(number, f"row {number}", value) for number, value in enumerate(values, 1)]
    if not objects:
        table.problems.append((0, "the file holds an empty list"))
    return _from_objects(objects, text, label, table)


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too big"


def _from_objects(
    values: list[tuple[int, str, Any]], text: str, label: str | None, table: Table
) -> Table:
    """Rows of JSON objects; what is no object becomes a problem."""
    objects = [entry for entry in values if isinstance(entry[2], dict)]
    for number, place, value in values:
        if not isinstance(value, dict):
            needs = "a text and a label" if label is not None else "a text"
            table.problems.append((number, f"{place}: not an object with {needs}"))
    found = list(dict.fromkeys(key for _, _, value in objects for key in value))
    lacking = [one for one in _wanted(text, label) if pick(one[0], found) is None]
    if not lacking:
        text_name, label_name = pick(text, found), None if label is None else pick(label, found)
        table.rows = [
            Row(
                number,
                place,
                value.get(text_name, MISSING),
                value.get(label_name, MISSING),
                tuple(value.items()) if label is None else (),
            )
            for number, place, value in objects
        ]
    elif objects:
        table.problems += [(0, no_column(*one, found)) for one in lacking]
    return table


def _parquet(content: bytes, text: str, label: str | None) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "reading Parquet needs pyarrow, which is not installed: pip install 'abft-mlx[data]'"
        ) from None
    table = Table()
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        header = file.schema_arrow.names
        where = _positions(header, text, label, table)
        if where is None:
            return table
        chosen = [header[place] for place in where if place is not None]
        read = list(dict.fromkeys(header)) if label is None else chosen
        _check_size(file.metadata, read)
        data = _batches(file, read)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        table.problems.append((0, f"not a Parquet file that can be read ({reason})"))
        return table
    try:
        texts = data.column(chosen[0]).to_pylist()
        labels = [MISSING] * len(texts) if label is None else data.column(chosen[1]).to_pylist()
        values = [tuple(one.items()) for one in data.to_pylist()] if label is None else None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        table.problems.append((0, f"holds a value that cannot be read ({error})"))
        return table
    if label is not None:
        table.names = _class_names(file.schema_arrow.metadata, chosen[1])
    parts = zip(texts, labels, values or [()] * len(texts), strict=True)
    table.rows = [Row(number, f"row {number}", *part) for number, part in enumerate(parts, 1)]
    if not table.rows:
        table.problems.append((0, "the file has columns and no rows"))
    return table


def _check_size(metadata: Any, chosen: Sequence[str]) -> None:
    """Refuse what the file itself says is too much, before any of it is unpacked."""
    size = 0
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            part = metadata.row_group(group).column(column)
            if part.path_in_schema.split(".")[0] in chosen:
                size += part.total_uncompressed_size
    _limit(metadata.num_rows, size)


def _limit(rows: int, size: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"{rows:,} rows, more than {MOST_ROWS:,}")
    if size > MOST_BYTES:
        raise ValueError(f"it unpacks to {size:,} bytes, more than {MOST_BYTES:,}")


def _batches(file: Any, chosen: list[str]) -> Any:
    """The chosen columns, part by part: one value can stand for many in the file's own sums."""
    import pyarrow

    read, rows, size = [], 0, 0
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=chosen):
        rows, size = rows + batch.num_rows, size + batch.nbytes
        _limit(rows, size)
        read.append(batch)
    fields = [file.schema_arrow.field(name) for name in chosen]
    return pyarrow.Table.from_batches(read, read[0].schema if read else pyarrow.schema(fields))


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Class names that the datasets library wrote into the file's schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) or None


READERS: dict[str, Callable[[bytes, str, str | None], Table]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
