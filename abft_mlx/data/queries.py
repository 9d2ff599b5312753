"""Texts without labels, to be classified: from a file, or from a stream as they come."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from abft_mlx.data import rows
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection

LINES = (".txt", "")
READ_BYTES = 2**16
LONGEST_LINE_BYTES = 2**24
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

    A table (CSV, JSON, Parquet) is read whole and checked before its first text. Of lines, one
    text each, a list is what a single read returns: somebody who types gets answers line by line,
    and a stream without end takes no more memory than READ_BYTES.

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
            skip: return texts that cannot be used, with their problem, in place of an error.

        Raises:
            DataError: no such file, a kind that is not read, or a file with texts that cannot be
                used.
        """
        self.source = source
        self.dropped = 0
        self._section = section
        self._stream = stream
        self._skip = skip
        self._table: rows.Table | None = None
        if stream is not None:
            return
        path = Path(source).expanduser()
        kind = path.suffix.lower()
        if kind in rows.READERS:
            self._table = rows.read(path, section.text, None)
        elif kind not in LINES:
            raise DataError(
                f"{source}: files ending in {kind!r} are not read; use .txt with a text in each "
                f"line, or one of {', '.join(rows.READERS)}"
            )
        elif not path.exists():
            raise DataError(
                f"{source}: no such file; a path is relative to the current folder, and - is "
                "standard input"
            )
        if path.is_file():
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
        headers = dict.fromkeys(
            tuple(name for name, _ in row.fields) for row in self._table.rows if row.fields
        )
        if len(headers) == 1:  # which may name a column twice
            return next(iter(headers))
        return tuple(dict.fromkeys(name for header in headers for name in header))

    def __iter__(self) -> Iterator[list[Query]]:
        """Lists of queries.

        Raises:
            DataError: a text cannot be used; those before it have been returned.
        """
        if self._table is not None:
            yield self._rows(self._table)
        elif self._stream is not None:
            yield from self._lines(self._stream)
        else:
            with Path(self.source).expanduser().open("rb") as stream:
                utf16 = stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
                yield from self._lines(_as_utf8(stream, self.source) if utf16 else stream)

    def _rows(self, table: rows.Table) -> list[Query]:
        """The queries of a table, checked."""
        problems = list(table.problems)
        queries: list[Query] = []
        for row in table.rows:
            wrong = row.problems or rows.text_problems(row.text) or _other_columns(row.fields)
            if not wrong:
                if self._admits(row.text):
                    queries.append(Query(row.text, row.place, row.fields))
                    continue
                if self._section.empty_texts != "refuse":
                    continue
                wrong = [_EMPTY]
            problems += [f"{row.place}: {line}" for line in wrong]
            text = row.text if isinstance(row.text, str) else ""
            queries.append(Query(text, row.place, row.fields, f"{row.place}: {wrong[0]}"))
        if table.problems or (problems and not self._skip):
            raise rows.refusal(self.source, problems)
        return queries

    def _lines(self, stream: BinaryIO) -> Iterator[list[Query]]:
        """Decoded lines; read1 returns what is there and does not wait for more."""
        number = 0
        begun = b""
        while True:
            read = stream.read1(READ_BYTES)  # type: ignore[attr-defined]
            *whole, begun = (begun + read).split(b"\n")
            if not read and begun:
                whole, begun = [begun], b""
            queries: list[Query] = []
            try:
                for line in whole:
                    number += 1
                    self._add(queries, line, number)
                if len(begun) > LONGEST_LINE_BYTES:
                    raise DataError(
                        f"{self.source} line {number + 1} is longer than "
                        f"{LONGEST_LINE_BYTES // 2**20} MiB; write each text in a line of its own"
                    )
            except DataError:
                yield queries
                raise
            if queries:
                yield queries
            if not read:
                return

    def _add(self, queries: list[Query], line: bytes, number: int) -> None:
        """Append a line's query, if it is not left out."""
        place = f"{self.source} line {number}"
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        problem = None
        try:
            text = line.decode(encoding).removesuffix("\r")
        except UnicodeDecodeError as error:
            byte = f"0x{line[error.start]:02x}"
            problem = f"{place} is not UTF-8 (byte {byte}); convert it to UTF-8"
            text = line.decode(encoding, errors="replace").removesuffix("\r")
        if problem is None:
            if self._admits(text):
                queries.append(Query(text, place))
                return
            if self._section.empty_texts != "refuse":
                return
            problem = f"{place}: {_EMPTY}"
        if not self._skip:
            raise DataError(problem)
        queries.append(Query(text, place, (), problem))

    def _admits(self, text: str) -> bool:
        """Whether a text is to be classified; counts the empty ones that are dropped."""
        if text.strip() or self._section.empty_texts == "keep":
            return True
        self.dropped += self._section.empty_texts == "drop"
        return False


def _other_columns(fields: Sequence[tuple[str, Any]]) -> list[str]:
    """Problems of columns that are only copied to the output."""
    texts = [value for _, value in fields if isinstance(value, str)]
    return [problem for text in texts for problem in rows.text_problems(text)][:1]


def _as_utf8(stream: BinaryIO, source: str) -> BinaryIO:
    """A UTF-16 file, read whole, as UTF-8."""
    try:
        return io.BytesIO(stream.read().decode("utf-16").encode())
    except UnicodeDecodeError:
        raise DataError(f"{source} is not UTF-16 throughout; convert it to UTF-8") from None


def queries_of(texts: Sequence[Any], source: str) -> list[Query]:
    """Texts of a Python program, checked.

    Raises:
        DataError: some cannot be used; the error carries every one of them.
    """
    problems = [
        f"item {number}: {line}"
        for number, text in enumerate(texts)
        for line in rows.text_problems(text)
    ]
    if problems:
        raise rows.refusal(source, problems)
    return [Query(text, f"{source} item {number}") for number, text in enumerate(texts)]
