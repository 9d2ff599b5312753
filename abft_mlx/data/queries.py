"""Texts without labels, to be classified: from a file, or from a stream as they come."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from abft_mlx.data import _rows
from abft_mlx.data._check import text_problems
from abft_mlx.data._rows import NOT_UTF8
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection

LINES = (".txt", "")
READ_BYTES = 2**16
LONGEST_LINE_BYTES = 2**24
_REPLACED = "\N{REPLACEMENT CHARACTER}"
_EMPTY = "the text is empty; remove it, or set data.empty_texts to drop or keep"


@dataclass(frozen=True)
class Query:
    """A text whose label is asked for.

    Attributes:
        text: as it was read.
        place: where it was read, for messages.
        fields: name and value of every column of its row; nothing for lines.
        problem: why it cannot be used, where such texts are to be skipped.
    """

    text: str
    place: str
    fields: tuple[tuple[str, Any], ...] = ()
    problem: str | None = None


class Queries:
    """The texts of a source, in order, in lists of what is there at once.

    A table (CSV, JSONL, Parquet) is read whole and checked before its first text is given. Of
    lines, one text each, a list is what a single read gives: somebody who types gets answers line
    by line, and a stream without end takes no more memory than READ_BYTES.

    Attributes:
        dropped: empty texts left out so far, with ``data.empty_texts: drop``.
    """

    def __init__(
        self,
        source: str,
        section: DataSection,
        stream: BinaryIO | None = None,
        *,
        skip: bool = False,
    ) -> None:
        """Prepare to read; a file is read once, to see that it can be.

        Args:
            source: a file; what ``stream`` is called in messages, where there is one.
            section: the column of the texts, and what to do with empty ones.
            stream: UTF-8 lines.
            skip: give texts that cannot be used, with their problem, in place of an error.

        Raises:
            DataError: no such file, a kind that is not read, or a file with texts that cannot be
                used.
        """
        self.source = source
        self.dropped = 0
        self._section = section
        self._stream = stream
        self._skip = skip
        path = Path(source).expanduser()
        kind = path.suffix.lower()
        self._table = None
        if stream is None and kind in _rows.READERS:
            self._table = _rows.read(path, section.text, None)
        elif stream is None and kind not in LINES:
            raise DataError(
                f"{source}: files ending in {kind!r} are not read; use .txt with a text in each "
                f"line, or one of {', '.join(_rows.READERS)}"
            )
        elif stream is None and not path.exists():
            raise DataError(
                f"{source}: no such file; a path is relative to the current folder, and - is "
                "standard input"
            )
        if stream is None and path.is_file():
            for _ in self:
                pass
            self.dropped = 0

    @property
    def known(self) -> int | None:
        """How many texts there are, empty ones included; None where only reading would tell."""
        return None if self._table is None else len(self._table.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, in order; ``text`` for lines."""
        if self._table is None:
            return ("text",)
        names = dict.fromkeys(tuple(name for name, _ in row.fields) for row in self._table.rows)
        if len(names) == 1:
            return next(iter(names))
        return tuple(dict.fromkeys(name for some in names for name in some))

    def __iter__(self) -> Iterator[list[Query]]:
        """Lists of queries.

        Raises:
            DataError: a text cannot be used; those before it have been given.
        """
        if self._table is not None:
            yield self._rows(self._table)
        elif self._stream is not None:
            yield from self._lines(self._stream)
        else:
            with Path(self.source).expanduser().open("rb") as stream:
                utf16 = stream.peek(2)[:2] in _rows.UTF16
                yield from self._lines(_as_utf8(stream, self.source) if utf16 else stream)

    def _rows(self, table: _rows.Table) -> list[Query]:
        known = dict(reversed(table.problems))
        problems = list(table.problems)
        found: list[tuple[int, Query]] = []
        for row in table.rows:
            wrong = [] if row.number in known else text_problems(row.text)
            if not wrong and NOT_UTF8 in known and _REPLACED in str(row.fields):
                wrong = ["not UTF-8"]
            problem = known.get(row.number)
            if not wrong and problem is None:
                if self._admits(row.text):
                    found.append((row.number, Query(row.text, row.place, row.fields)))
                    continue
                if self._section.empty_texts != "refuse":
                    continue
                wrong = [_EMPTY]
            problems += [(row.number, f"{row.place}: {line}") for line in wrong]
            problem = problem or f"{row.place}: {wrong[0]}"
            text = row.text if isinstance(row.text, str) else ""
            found.append((row.number, Query(text, row.place, row.fields, problem)))
        problems.sort(key=lambda problem: problem[0])
        whole = [line for number, line in problems if number == 0]
        if whole or (problems and not self._skip):
            lines = [line for _, line in problems]
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            raise DataError(f"{self.source}: {lines[0]}{more}", lines)
        # Rows that are none, such as lines that are no JSON.
        rows = {row.number for row in table.rows}
        for number, line in problems:
            if number > 0 and number not in rows:
                found.append((number, Query("", f"row {number}", (), line)))
        return [query for _, query in sorted(found, key=lambda one: one[0])]

    def _lines(self, stream: BinaryIO) -> Iterator[list[Query]]:
        """Decoded lines; read1 gives what is there and does not wait for more."""
        number = 0
        begun = b""
        while True:
            read = stream.read1(READ_BYTES)  # type: ignore[attr-defined]
            *whole, begun = (begun + read).split(b"\n")
            if not read and begun:
                whole, begun = [begun], b""
            found: list[Query] = []
            try:
                for line in whole:
                    number += 1
                    self._add(found, line, number)
                if len(begun) > LONGEST_LINE_BYTES:
                    raise DataError(
                        f"{self.source} line {number + 1} is longer than "
                        f"{LONGEST_LINE_BYTES // 2**20} MiB; write each text in a line of its own"
                    )
            except DataError:
                yield found
                raise
            if found:
                yield found
            if not read:
                return

    def _add(self, found: list[Query], line: bytes, number: int) -> None:
        place = f"{self.source} line {number}"
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        problem = None
        try:
            text = line.decode(encoding).removesuffix("\r")
        except UnicodeDecodeError as error:
            byte = f"0x{line[error.start]:02x}"
            problem = f"{place} is not UTF-8 (byte {byte}); convert it to UTF-8"
            text = line.decode(encoding, errors="replace").removesuffix("\r")
        if problem is None and self._admits(text):
            found.append(Query(text, place))
            return
        if problem is None and self._section.empty_texts != "refuse":
            return
        problem = problem or f"{place}: {_EMPTY}"
        if not self._skip:
            raise DataError(problem)
        found.append(Query(text, place, (), problem))

    def _admits(self, text: str) -> bool:
        """Whether a text is to be classified; counts the empty ones that are dropped."""
        if text.strip() or self._section.empty_texts == "keep":
            return True
        self.dropped += self._section.empty_texts == "drop"
        return False


def _as_utf8(stream: BinaryIO, source: str) -> BinaryIO:
    """A UTF-16 file, read whole, as UTF-8."""
    try:
        return io.BytesIO(stream.read().decode("utf-16").encode())
    except UnicodeDecodeError:
        raise DataError(f"{source} is not UTF-16 throughout; convert it to UTF-8") from None
