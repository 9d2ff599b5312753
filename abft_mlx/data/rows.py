"""Rows of CSV, JSON, Parquet and text files: labelled ones as a table, others also as a stream."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection

MISSING = object()
LINES = (".txt", "")
READ_BYTES = 2**16
LONGEST_LINE_BYTES = 2**24
# A text may be longer than the 131,072 characters that csv allows in a field.
csv.field_size_limit(2**31 - 1)
_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_EMPTY = "the text is empty; remove it, or set data.empty_texts to drop or keep"

Fields = Sequence[tuple[str, Any]]


@dataclass
class Row:
    """One row as read."""

    place: str  # where it is in its file, for messages, such as ``row 7 (line 9)``
    text: Any = MISSING
    label: Any = MISSING
    fields: Fields = ()  # of every column, where texts alone are read
    problem: str | None = None  # why it cannot be used


@dataclass
class Table:
    """What could be read of a file."""

    rows: list[Row] = field(default_factory=list)  # bad ones included
    problems: list[str] = field(default_factory=list)  # of the file as a whole
    names: tuple[str, ...] | None = None  # class names that the file itself carries


class _Columns:
    """The columns to find: of ``sentence|text`` the first that exists; no label for texts alone."""

    def __init__(self, text: str, label: str | None) -> None:
        self.text, self.label = text, label
        self.needs = "a text" if label is None else "a text and a label"

    def find(self, header: Sequence[str], problems: list[str]) -> list[str]:
        """The names of the columns, or nothing and problems."""
        names = []
        for wanted, option in ((self.text, "text"), (self.label, "label")):
            allowed = [name.strip() for name in (wanted or "").split("|") if name.strip()]
            name = _pick(allowed, header)
            if wanted is None:
                continue
            if name is None:
                shown = ", ".join(brief(column) for column in header[:12]) or "none"
                shown += f" and {len(header) - 12} more" if len(header) > 12 else ""
                problems.append(
                    f"no column {' or '.join(map(repr, allowed))}; the columns are {shown}: name "
                    f"yours with --{option}-column, or as data.{option} in a recipe"
                )
            elif header.count(name) > 1:
                problems.append(f"the header names column {name!r} twice")
            else:
                names.append(name)
        return [] if problems else names

    def row(self, place: str, names: Sequence[str], fields: Fields, problem: str | None) -> Row:
        """A row of a table with these fields."""
        values = {} if problem else dict(fields)
        texts_alone = self.label is None
        return Row(
            place,
            values.get(names[0], MISSING),
            MISSING if texts_alone else values.get(names[1], MISSING),
            fields if texts_alone else (),
            problem,
        )


def _pick(allowed: Sequence[str], header: Sequence[str]) -> str | None:
    """The first allowed column that exists; upper and lower case differ only where they must."""
    for name in allowed:
        if name in header:
            return name
    for name in allowed:
        near = [column for column in header if column.lower() == name.lower()]
        if len(near) == 1:
            return near[0]
    return None


def read(path: Path, text: str, label: str | None) -> Table:
    """Read a file by its ending.

    Args:
        path: of the file.
        text: the columns allowed for texts, as in ``sentence|text``.
        label: the same for labels; None reads texts alone, also from a .txt file.

    Raises:
        DataError: the file cannot be opened, or its kind is unknown.
    """
    kind = path.suffix.lower()
    reader = _lines if label is None and kind in LINES else READERS.get(kind)
    if reader is None:
        more = ".txt with a text in each line, or " if label is None else ""
        raise DataError(
            f"{path}: files ending in {kind or 'nothing'!r} are not read; "
            f"use {more}one of {', '.join(READERS)}"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a path is relative to the current folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    columns, table = _Columns(text, label), Table()
    if content.strip() or kind in LINES:
        reader(content, columns, table)
    else:
        table.problems.append(f"the file is empty; it needs {columns.needs} in each row")
    return table


def _decode(content: bytes, table: Table) -> str:
    """The text of a file, UTF-8 or UTF-16 with its mark.

    A byte that is not UTF-8 becomes a surrogate (U+DC80 to U+DCFF), which the check of its row
    finds.
    """
    if not content.startswith(_UTF16):
        return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        return content.decode("utf-16")
    except UnicodeDecodeError as error:
        line = content[: error.start].decode("utf-16", errors="replace").count("\n") + 1
        table.problems.append(f"line {line} is not UTF-16; save the file as UTF-8")
        return content.decode("utf-16", errors="replace")


def _csv(content: bytes, columns: _Columns, table: Table) -> None:
    """Rows of a CSV file, whatever its delimiter."""
    source = _decode(content, table)
    first = source.strip().split("\n", 1)[0]
    # Comma, unless only semicolons or tabs give the columns that are wanted.
    headers = {mark: [cell.strip(' \r\t"') for cell in first.split(mark)] for mark in ",;\t"}
    mark = next((mark for mark, header in headers.items() if columns.find(header, [])), ",")
    reader = csv.reader(io.StringIO(source, newline=""), delimiter=mark, strict=True)
    header: list[str] = []
    names: list[str] = []
    start = 1  # the physical line of a row
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                names = columns.find(header, table.problems)
                if not names:
                    return
                continue
            problem = None
            if len(cells) != len(header):
                problem = (
                    f"{len(cells)} fields where the header has {len(header)}; put quotes around a "
                    f"field that holds {mark!r}"
                )
                cells += [""] * (len(header) - len(cells))
            place = f"row {len(table.rows) + 1} (line {line})"
            fields = tuple(zip(header, cells, strict=False))
            table.rows.append(columns.row(place, names, fields, problem))
    except csv.Error as error:
        place = f"row {len(table.rows) + 1} (up to line {reader.line_num})"
        table.rows.append(Row(place, problem=f"{error}; check quotes"))
    if not table.rows and not table.problems:
        table.problems.append("the file has a header and no rows")


def _json(content: bytes, columns: _Columns, table: Table) -> None:
    """A JSON array of objects, or a JSON object in every line."""
    source = _decode(content, table)
    values: list[tuple[str, Any]] = []
    if source.lstrip().startswith("["):
        try:
            values = [(f"row {number}", item) for number, item in enumerate(json.loads(source), 1)]
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            table.problems.append(f"line {line}: not JSON ({_reason(error)})")
            return
        if not values:
            table.problems.append("the file holds an empty list")
    else:
        lines = [(n, line) for n, line in enumerate(source.split("\n"), 1) if line.strip()]
        for number, (line_number, line) in enumerate(lines, 1):
            place = f"row {number}" + ("" if number == line_number else f" (line {line_number})")
            try:
                values.append((place, json.loads(line)))
            except (ValueError, RecursionError) as error:
                values.append((place, error))
    objects = [value for _, value in values if isinstance(value, dict)]
    header = list(dict.fromkeys(key for value in objects for key in value))
    names = columns.find(header, table.problems) if objects else ["", ""]
    for place, value in values if names else ():
        fields: Fields = ()
        problem = None
        if isinstance(value, dict):
            fields = tuple(value.items())
        elif isinstance(value, Exception):
            problem = f"not JSON ({_reason(value)})"
        else:
            problem = f"not an object with {columns.needs}"
        table.rows.append(columns.row(place, names, fields, problem))


def _reason(error: Exception) -> str:
    """Why a text is not JSON."""
    return error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too big"


def _parquet(content: bytes, columns: _Columns, table: Table) -> None:
    """Rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "reading Parquet needs pyarrow, which is not installed: pip install 'abft-mlx[data]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = columns.find(file.schema_arrow.names, table.problems)
        if not names:
            return
        rows = file.read(columns=names if columns.label is not None else None).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).split("\n", 1)[0]
        table.problems.append(f"not a Parquet file that can be read ({reason})")
        return
    for number, row in enumerate(rows, 1):
        table.rows.append(columns.row(f"row {number}", names, tuple(row.items()), None))
    if not rows:
        table.problems.append("the file has columns and no rows")
    if columns.label is not None:
        try:  # class names that the datasets library wrote into the schema
            facts = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
            listed = facts["info"]["features"][names[1]]["names"]
            table.names = tuple(str(name) for name in listed) or None
        except (KeyError, TypeError, ValueError):
            pass


def _lines(content: bytes, columns: _Columns, table: Table) -> None:
    """A text in every line."""
    del columns
    lines = _decode(content, table).removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, 1):
        table.rows.append(Row(f"line {number}", line.removesuffix("\r")))


READERS: dict[str, Callable[[bytes, _Columns, Table], None]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def text_problem(text: Any) -> str | None:
    """What keeps a value from being a text; an empty one passes."""
    if text is MISSING or text is None:
        return "there is no text"
    if not isinstance(text, str):
        return f"the text is {brief(text)}, which is not a string"
    return encoding_problem(text, "the text")


def encoding_problem(text: str, what: str) -> str | None:
    """Why a text cannot be written as UTF-8, if it cannot."""
    match = None if text.isascii() else _SURROGATE.search(text)
    if match is None:
        return None
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # of surrogateescape
        return f"{what} is not UTF-8 (byte 0x{code - 0xDC00:02x}); save the file as UTF-8"
    return f"{what} holds half a character (a lone surrogate)"


def brief(value: Any) -> str:
    """A value for a message."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def refusal(source: str, problems: Sequence[str]) -> DataError:
    """The error that carries all problems of a source."""
    more = len(problems) - 1
    tail = f" (and {more} more problem{'s' * (more > 1)})" if more else ""
    return DataError(f"{source}: {problems[0]}{tail}", problems)


@dataclass(frozen=True)
class Query:
    """A text whose label is asked for."""

    text: str
    place: str  # where it was read, for messages
    fields: Fields = ()  # of its row; nothing for lines
    problem: str | None = None  # why it cannot be used, where such texts are to be skipped


class Queries:
    """The texts of a source, in order, in lists of what is there at once.

    A file is read whole and checked before its first text. Of a stream of lines a list is what a
    single read returns: somebody who types gets answers line by line, and a stream without end
    takes no more memory than READ_BYTES.

    Attributes:
        dropped: empty texts left out so far, with ``data.empty_texts: drop``.
        total: texts, empty ones included; None for a stream.
        columns: the names of all columns, in order; ``text`` for lines.
    """

    def __init__(
        self,
        source: str,
        section: DataSection,
        stream: BinaryIO | None = None,
        *,
        skip: bool = False,
    ) -> None:
        """Read a file, or prepare to read a stream.

        Args:
            source: a file; what ``stream`` is called in messages, where there is one.
            section: the column of the texts, and what to do with empty ones.
            stream: UTF-8 lines.
            skip: return texts that cannot be used, with their problem, in place of an error.

        Raises:
            DataError: no such file, a kind that is not read, or a file with texts that cannot be
                used.
        """
        self.source, self.dropped = source, 0
        self.total: int | None = None
        self.columns: tuple[str, ...] = ("text",)
        self._empty, self._skip, self._stream = section.empty_texts, skip, stream
        self._texts: list[Query] = []
        if stream is not None:
            return
        path = Path(source).expanduser()
        if path.suffix.lower() in LINES and path.exists() and not path.is_file():
            self._stream = path.open("rb")  # such as a pipe
            return
        table = read(path, section.text, None)
        self.total = len(table.rows)
        headers = dict.fromkeys(tuple(n for n, _ in row.fields) for row in table.rows if row.fields)
        if len(headers) == 1:  # which may name a column twice
            self.columns = next(iter(headers))
        elif headers:
            self.columns = tuple(dict.fromkeys(name for header in headers for name in header))
        problems = list(table.problems)
        for row in table.rows:
            query = self._query(row)
            if query is not None:
                self._texts.append(query)
                problems += [query.problem] if query.problem else []
        if table.problems or (problems and not skip):
            raise refusal(source, problems)

    def __iter__(self) -> Iterator[list[Query]]:
        """Lists of queries.

        Raises:
            DataError: a text of a stream cannot be used; those before it have been returned.
        """
        if self._stream is None:
            yield self._texts
            return
        number, begun, at_end = 0, b"", False
        while not at_end:
            content = self._stream.read1(READ_BYTES)  # type: ignore[attr-defined]
            at_end = not content
            *lines, begun = (begun + content).split(b"\n")
            if at_end and begun:
                lines = [begun]
            queries: list[Query] = []
            problem = None
            for line in lines:
                number += 1
                coding = "utf-8-sig" if number == 1 else "utf-8"
                text = line.decode(coding, "surrogateescape").removesuffix("\r")
                query = self._query(Row(f"{self.source} line {number}", text))
                problem = query.problem if query and not self._skip else None
                if problem:
                    break
                queries += [query] if query else []
            if not problem and len(begun) > LONGEST_LINE_BYTES:
                problem = (
                    f"{self.source} line {number + 1} is longer than {LONGEST_LINE_BYTES // 2**20} "
                    "MiB; write each text in a line of its own"
                )
            if queries:
                yield queries
            if problem:
                raise DataError(problem)

    def _query(self, row: Row) -> Query | None:
        """The query of a row; None for an empty text that is dropped."""
        # Other columns are only copied to the output.
        cells = [value for _, value in row.fields if isinstance(value, str)]
        problem = row.problem or text_problem(row.text)
        problem = problem or next(filter(None, map(text_problem, cells)), None)
        text = row.text if isinstance(row.text, str) else ""
        if not problem and not text.strip() and self._empty != "keep":
            if self._empty == "drop":
                self.dropped += 1
                return None
            problem = _EMPTY
        return Query(text, row.place, row.fields, f"{row.place}: {problem}" if problem else None)


def queries_of(texts: Sequence[Any], source: str) -> list[Query]:
    """Texts of a Python program, checked.

    Raises:
        DataError: some cannot be used; the error carries every one of them.
    """
    numbered = list(enumerate(texts))
    problems = [f"item {n}: {problem}" for n, text in numbered if (problem := text_problem(text))]
    if problems:
        raise refusal(source, problems)
    return [Query(text, f"{source} item {n}") for n, text in numbered]
