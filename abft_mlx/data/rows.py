"""Rows of CSV, JSON and Parquet files, or of a program: read, checked, every problem kept."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abft_mlx.data.texts import LabelledTexts
from abft_mlx.errors import SHOWN, DataError, first_few

MISSING = object()
MOST_CLASSES, MANY_CLASSES = 150, 50
NO_LABEL = "there is no label"
# A text may be longer than the 131,072 characters that csv allows in a field.
csv.field_size_limit(2**31 - 1)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Row:
    """One row as read.

    Attributes:
        place: where it is in its file, for messages, such as ``row 7 (line 9)``.
        text: MISSING where it lacks the column.
        label: likewise.
        fields: name and value of every column, of a file that is read for its texts alone.
        problems: why it cannot be used, one line each.
    """

    place: str
    text: Any = MISSING
    label: Any = MISSING
    fields: tuple[tuple[str, Any], ...] = ()
    problems: list[str] = field(default_factory=list)


@dataclass
class Table:
    """What could be read of a file.

    Attributes:
        rows: in order, bad ones included.
        problems: of the file as a whole.
        names: class names that the file itself carries, if any.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Columns:
    """The columns to find: of texts, and of labels unless only texts are read.

    Attributes:
        text: ``sentence|text`` takes the first that exists.
        label: likewise.
    """

    text: str
    label: str | None

    @property
    def needs(self) -> str:
        """What a row must have, in words."""
        return "a text and a label" if self.label is not None else "a text"

    def find(self, header: Sequence[str], table: Table) -> list[str] | None:
        """The names of the columns of texts and labels; problems go into the table."""
        names = []
        for wanted, option in ((self.text, "text"), (self.label, "label")):
            if wanted is None:
                continue
            name = pick(wanted, header)
            if name is None:
                table.problems.append(_no_column(wanted, option, header))
            elif header.count(name) > 1:
                table.problems.append(f"the header names column {name!r} twice")
            names.append(name)
        return None if table.problems else [name for name in names if name is not None]

    def row(self, place: str, names: Sequence[str], fields: Sequence[tuple[str, Any]]) -> Row:
        """A row of a table with these fields."""
        values = dict(fields)
        if self.label is None:
            return Row(place, values.get(names[0], MISSING), fields=tuple(fields))
        return Row(place, values.get(names[0], MISSING), values.get(names[1], MISSING))


def pick(wanted: str, header: Sequence[str]) -> str | None:
    """The first allowed column that exists; upper and lower case differ only where they must."""
    allowed = [name.strip() for name in wanted.split("|") if name.strip()]
    exact = next((name for name in allowed if name in header), None)
    if exact is not None:
        return exact
    near = [[name for name in header if name.lower() == one.lower()] for one in allowed]
    return next((names[0] for names in near if len(names) == 1), None)


def _no_column(wanted: str, option: str, header: Sequence[str]) -> str:
    """The line for a column that is not there."""
    shown = ", ".join(brief(name) for name in header[:12]) or "none"
    shown += f" and {len(header) - 12} more" if len(header) > 12 else ""
    asked = " or ".join(repr(name.strip()) for name in wanted.split("|") if name.strip())
    return (
        f"no column {asked}; the columns are {shown}: name yours with --{option}-column, or as "
        f"data.{option} in a recipe"
    )


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
    columns, table = Columns(text, label), Table()
    if not content.strip():
        table.problems.append(f"the file is empty; it needs {columns.needs} in each row")
    else:
        reader(content, columns, table)
    return table


def decode(content: bytes) -> str:
    """The text of a file, UTF-8 or UTF-16 with its mark.

    A byte that is not UTF-8 becomes a surrogate (U+DC80 to U+DCFF), which the check of its row
    finds.

    Raises:
        DataError: UTF-16 with a mistake; the message names the line.
    """
    if not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        return content.decode("utf-16")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-16", errors="replace").count("\n")
        raise DataError(f"line {before + 1} is not UTF-16; save the file as UTF-8") from None


def _csv(content: bytes, columns: Columns, table: Table) -> None:
    """Rows of a CSV file, whatever its delimiter."""
    source = _decoded(content, table)
    delimiter = _delimiter(source.lstrip().split("\n", 1)[0], columns)
    reader = csv.reader(io.StringIO(source, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    names: list[str] | None = None
    start = 1  # the physical line of a row
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                names = columns.find(header, table)
                continue
            if names is None:
                return
            place = f"row {len(table.rows) + 1} (line {line})"
            fields = list(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=False))
            row = columns.row(place, names, fields)
            if len(cells) != len(header):
                row.text = row.label = MISSING
                row.problems.append(
                    f"{len(cells)} fields where the header has {len(header)}; put quotes around "
                    f"a field that holds {delimiter!r}"
                )
            table.rows.append(row)
    except csv.Error as error:
        place = f"row {len(table.rows) + 1} (up to line {reader.line_num})"
        table.rows.append(Row(place, problems=[f"{error}; check quotes"]))
    if not table.rows and not table.problems:
        table.problems.append("the file has a header and no rows")


def _delimiter(header: str, columns: Columns) -> str:
    """Comma, unless only semicolons or tabs give the columns that are wanted."""
    for delimiter in (",", ";", "\t"):
        names = [cell.strip().strip('"') for cell in header.strip().split(delimiter)]
        if columns.find(names, Table()) is not None:
            return delimiter
    return ","


def _decoded(content: bytes, table: Table) -> str:
    """As `decode`, with a mistake in UTF-16 as a problem of the file."""
    try:
        return decode(content)
    except DataError as error:
        table.problems.append(str(error))
        return content.decode("utf-16", errors="replace")


def _json(content: bytes, columns: Columns, table: Table) -> None:
    """A JSON array of objects, or a JSON object in every line."""
    source = _decoded(content, table)
    rows: list[tuple[Row, Any]] = []
    if source.lstrip().startswith("["):
        try:
            values = json.loads(source)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            table.problems.append(f"line {line}: not JSON ({_reason(error)})")
            return
        rows = [(Row(f"row {number}"), value) for number, value in enumerate(values, 1)]
        if not rows:
            table.problems.append("the file holds an empty list")
    else:
        lines = [(n, line) for n, line in enumerate(source.split("\n"), 1) if line.strip()]
        for number, (line_number, line) in enumerate(lines, 1):
            at = "" if number == line_number else f" (line {line_number})"
            row, value = Row(f"row {number}{at}"), None
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                row.problems.append(f"not JSON ({_reason(error)})")
            rows.append((row, value))
    objects = [value for _, value in rows if isinstance(value, dict)]
    header = list(dict.fromkeys(key for value in objects for key in value))
    names = columns.find(header, table) if objects else None
    if objects and names is None:
        return
    for row, value in rows:
        if isinstance(value, dict) and names is not None:
            row = columns.row(row.place, names, list(value.items()))
        elif not row.problems:
            row.problems.append(f"not an object with {columns.needs}")
        table.rows.append(row)


def _reason(error: Exception) -> str:
    """Why a text is not JSON."""
    return error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too big"


def _parquet(content: bytes, columns: Columns, table: Table) -> None:
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
        names = columns.find(file.schema_arrow.names, table)
        if names is None:
            return
        rows = file.read(columns=names if columns.label is not None else None).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).split("\n", 1)[0]
        table.problems.append(f"not a Parquet file that can be read ({reason})")
        return
    table.rows = [
        columns.row(f"row {number}", names, list(row.items())) for number, row in enumerate(rows, 1)
    ]
    if columns.label is not None:
        table.names = _class_names(file.schema_arrow.metadata, names[1])
    if not table.rows:
        table.problems.append("the file has columns and no rows")


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Class names that the datasets library wrote into the file's schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"]) or None
    except (KeyError, TypeError, ValueError):
        return None


READERS: dict[str, Callable[[bytes, Columns, Table], None]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


@dataclass(frozen=True)
class Report:
    """What a data set holds and what is wrong with it.

    Attributes:
        source: where it was read.
        rows: how many rows were read, bad ones included.
        class_counts: rows of each class among those that could be used.
        problems: one line each, in row order; anything here keeps the data from being used.
        warnings: one line each; oddities that do not.
        texts: the labelled texts, where there is no problem.
    """

    source: str
    rows: int
    class_counts: dict[str, int]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    texts: LabelledTexts | None

    def require(self) -> LabelledTexts:
        """The labelled texts.

        Raises:
            DataError: there are problems; the error carries them all.
        """
        if self.texts is None:
            raise refusal(self.source, self.problems)
        return self.texts


def refusal(source: str, problems: Sequence[str]) -> DataError:
    """The error that carries all problems of a source."""
    more = len(problems) - 1
    tail = f" (and {more} more problem{'s' * (more > 1)})" if more else ""
    return DataError(f"{source}: {problems[0]}{tail}", problems)


def check(
    table: Table, source: str, labels: Sequence[str] | None, empty_texts: str = "refuse"
) -> Report:
    """Check every row of a table.

    Args:
        table: rows as read, with the problems of reading.
        source: where they were read, for messages.
        labels: class names in order, or None to take them from the table.
        empty_texts: refuse, drop or keep.
    """
    problems = list(table.problems)
    warnings: list[str] = []
    words = [label_word(row.label) for row in table.rows]
    space = _Space.of([word for word, reason in words if not reason], labels, table.names)
    if space.problem:
        problems.append(space.problem)
    good: list[tuple[str, int, str]] = []
    padded: list[str] = []
    empty = 0
    for row, (word, reason) in zip(table.rows, words, strict=True):
        wrong = list(row.problems)
        if not wrong:
            wrong = text_problems(row.text)
            blank = isinstance(row.text, str) and not row.text.strip()
            if blank and empty_texts != "keep":
                empty += 1
                if empty_texts == "drop":
                    continue
                wrong.append(
                    "the text is empty; fix or remove the row, or set data.empty_texts: drop"
                )
            index = None if reason or space.problem else space.index(word)
            if reason and not (wrong and reason == NO_LABEL):  # an empty row is one problem
                wrong.append(reason)
            elif not reason and not space.problem and index is None:
                wrong.append(space.unknown(word))
            if isinstance(row.label, str) and row.label != row.label.strip():
                padded.append(row.place)
            if not wrong and index is not None:
                good.append((row.text, index, row.place))
        problems += [f"{row.place}: {line}" for line in wrong]
    if empty and empty_texts == "drop":
        warnings.append(f"rows left out because their text is empty: {empty}")
    if padded:
        warnings.append(f"labels with spaces around them were read without: {first_few(padded)}")
    counts = dict.fromkeys(space.names, 0)
    for _, index, _ in good:
        counts[space.names[index]] += 1
    used = [name for name, count in counts.items() if count]
    if not problems and len(used) < 2:
        problems.append(
            f"every label is {used[0]!r}; a classifier needs at least two classes"
            if used
            else "no rows are left"
        )
    absent = [repr(name) for name, count in counts.items() if not count]
    if absent:
        warnings.append(f"no row has label {first_few(absent)}")
    warnings += _unlikely(space.names) + _repeated(good, space.names)
    texts = None
    if not problems:
        written, indices, places = zip(*good, strict=True)
        texts = LabelledTexts(written, indices, space.names, source, tuple(warnings), places)
    return Report(source, len(table.rows), counts, tuple(problems), tuple(warnings), texts)


@dataclass(frozen=True)
class _Space:
    """The classes of a data set, and how its labels name them."""

    names: tuple[str, ...]
    numbered: bool = False
    problem: str | None = None

    @classmethod
    def of(
        cls, words: Sequence[str], listed: Sequence[str] | None, carried: Sequence[str] | None
    ) -> _Space:
        """Classes from the names listed, those the file carries, or the labels themselves.

        Integer labels without names are named "0", "1", ...: words for a prompt that few
        tokenizers hold as one token after a space, so such data want prompt.label_words.
        """
        names = tuple(listed or carried or ())
        if names:
            return cls(names, numbered=not any(_is_whole(name) for name in names))
        distinct = set(words)
        # Labels of a classifier come again; more than a few that mostly do not are something else.
        rarely = len(distinct) > MANY_CLASSES and 2 * len(distinct) > len(words)
        if rarely or len(distinct) > MOST_CLASSES:
            examples = ", ".join(brief(word) for word in sorted(distinct)[:3])
            problem = (
                f"{len(distinct)} distinct labels ({examples}, ...) look like free text "
                "or numbers, not classes; check --label-column (data.label), or list the classes "
                "in data.labels"
            )
            return cls((), problem=problem)
        numbers = all(_is_whole(word) for word in distinct)
        return cls(tuple(sorted(distinct, key=int if numbers else None)))

    def index(self, word: str) -> int | None:
        """The class of a label: its name, or its number where no name is a number itself."""
        if word in self.names:
            return self.names.index(word)
        number = word.removesuffix(".0")
        if self.numbered and _is_whole(number) and 0 <= int(number) < len(self.names):
            return int(number)
        return None

    def unknown(self, word: str) -> str:
        """The line for a label that names no class."""
        lowered = {name.lower(): name for name in reversed(self.names)}
        near = difflib.get_close_matches(word.lower(), lowered, n=1)
        guess = f" (did you mean {lowered[near[0]]!r}?)" if near else ""
        shown = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
        return (
            f"label {brief(word)} is not one of {shown}{guess}; fix the row or add the label to "
            "data.labels"
        )


def _is_whole(word: str) -> bool:
    """Whether a word is a whole number as Python writes it."""
    return re.fullmatch(r"0|-?[1-9][0-9]{0,18}", word) is not None


def label_word(value: Any) -> tuple[str, str]:
    """A label as a word (numbers and flags written out, without spaces around it), and its problem.

    One of the two is empty.
    """
    if value is MISSING or value is None:
        return "", NO_LABEL
    if isinstance(value, bool):
        return str(value).lower(), ""
    if isinstance(value, float):
        if math.isnan(value):
            return "", "there is no label (NaN)"
        if not value.is_integer():
            return "", f"label {value!r} is a fraction, not a class"
        return str(int(value)), ""
    if isinstance(value, int):
        return str(value), ""
    if not isinstance(value, str):
        return "", f"the label is {brief(value)}, which is neither a word nor a whole number"
    word = value.strip()
    return word, _encoding_problem(word, "the label") if word else NO_LABEL


def text_problems(text: Any) -> list[str]:
    """What keeps a value from being a text, one line each; an empty one passes."""
    if text is MISSING or text is None:
        return ["there is no text"]
    if not isinstance(text, str):
        return [f"the text is {brief(text)}, which is not a string"]
    problem = _encoding_problem(text, "the text")
    return [problem] if problem else []


def _encoding_problem(text: str, what: str) -> str:
    """Why a text cannot be written as UTF-8; empty if it can."""
    match = None if text.isascii() else _SURROGATE.search(text)
    if match is None:
        return ""
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # of `decode`
        return f"{what} is not UTF-8 (byte 0x{code - 0xDC00:02x}); save the file as UTF-8"
    return f"{what} holds half a character (a lone surrogate)"


def brief(value: Any) -> str:
    """A value for a message."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _unlikely(names: Sequence[str]) -> list[str]:
    """Warnings for classes that somebody may not have meant."""
    alike = defaultdict(list)
    for name in names:
        alike[" ".join(name.casefold().split())].append(name)
    groups = [" and ".join(map(repr, some)) for some in alike.values() if len(some) > 1]
    warnings = []
    if groups:
        warnings.append(
            f"labels {first_few(groups)} differ only in case or spaces: are they one class? If so, "
            "write them alike; they are separate classes now"
        )
    if len(names) > MANY_CLASSES:
        warnings.append(
            f"there are {len(names)} classes; if that is not so, check --label-column (data.label)"
        )
    return warnings


def _repeated(good: Sequence[tuple[str, int, str]], names: Sequence[str]) -> list[str]:
    """Warnings for texts that occur again: with the same label, and with another."""
    rows_of: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for text, index, place in good:
        rows_of[text].append((index, place))
    warnings = []
    again = [rows for rows in rows_of.values() if len(rows) > 1]
    if again:
        extra = sum(len(rows) - 1 for rows in again)
        groups = first_few([first_few([place for _, place in rows], "=") for rows in again])
        warnings.append(f"{extra} rows repeat an earlier text exactly: {groups}")
    for rows in [rows for rows in again if len({index for index, _ in rows}) > 1][:SHOWN]:
        listed = first_few([f"{place} {names[index]!r}" for index, place in rows])
        warnings.append(f"the same text has different labels: {listed}")
    return warnings


def listed(values: Any, what: str) -> list[Any]:
    """A one-dimensional collection (list, tuple, array, column of a table) as a list.

    Raises:
        DataError: it is a single text, or no such collection.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise DataError(f"{what} is {values!r:.60}; give a list with an item for each text")
    dimensions = getattr(values, "ndim", 1)
    if dimensions != 1:
        raise DataError(
            f"{what} has {dimensions} dimensions; give one column of it, an item for each text"
        )
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's own value; anything else as it is."""
    return value.item() if hasattr(value, "dtype") and hasattr(value, "item") else value


def word(label: Any) -> str:
    """The name of a class whose labels are words, whole numbers or truth values.

    Raises:
        DataError: it can be no label.
    """
    label = _plain(label)
    name, problem = label_word(label)
    if problem:
        raise DataError(f"label {label!r:.40} cannot be used: {problem}")
    return name


def given(
    texts: Sequence[Any],
    labels: Sequence[Any],
    names: Sequence[str] | None,
    source: str,
    empty_texts: str = "refuse",
) -> LabelledTexts:
    """Check texts and labels of a Python program as those of a file are checked.

    Args:
        texts: N texts.
        labels: N words, whole numbers or truth values.
        names: the classes in order, or None to take them from the labels.
        source: what to call them in messages.
        empty_texts: refuse, drop or keep.

    Raises:
        DataError: they do not fit together or hold problems; the error carries every one of them.
    """
    if len(texts) != len(labels):
        raise DataError(f"{source}: {len(texts)} texts and {len(labels)} labels; give one for each")
    pairs = enumerate(zip(texts, labels, strict=True))
    rows = [Row(f"item {number}", text, label) for number, (text, label) in pairs]
    return check(Table(rows), source, names, empty_texts).require()
