"""Texts without labels, to be classified: from a file, or from a stream as they come."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from abft_mlx.data import _rows
from abft_mlx.data._check import text_problems
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection

LINES = (".txt", "")
READ_BYTES = 2**16
LONGEST_LINE_BYTES = 2**24
_EMPTY = "the text is empty; remove it, or set data.empty_texts to drop or keep"


@dataclass(frozen=True)
class Query:
    """A text whose label is asked for, and where it was read, for messages."""

    text: str
    place: str


class Queries:
    """The texts of a source, in order, in lists of what is there at once.

    A table (CSV, JSONL, Parquet) is read whole and checked before its first text is given. Of
    lines, one text each, a list is what a single read gives: somebody who types gets answers line
    by line, and a stream without end takes no more memory than READ_BYTES.

    Attributes:
        dropped: empty texts left out so far, with ``data.empty_texts: drop``.
    """

    def __init__(self, source: str, section: DataSection, stream: BinaryIO | None = None) -> None:
        """Prepare to read.

        Args:
            source: a file; what ``stream`` is called in messages, where there is one.
            section: the column of the texts, and what to do with empty ones.
            stream: UTF-8 lines.

        Raises:
            DataError: no such file, or a kind that is not read.
        """
        self.source = source
        self.dropped = 0
        self._section = section
        self._stream = stream
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

    @property
    def known(self) -> int | None:
        """How many texts there are, empty ones included; None where only reading would tell."""
        return None if self._table is None else len(self._table.rows)

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
        problems = list(table.problems)
        found = []
        for row in table.rows:
            wrong = text_problems(row.text)
            if not wrong and self._admits(row.text):
                found.append(Query(row.text, row.place))
            elif not wrong and self._section.empty_texts == "refuse":
                wrong = [_EMPTY]
            problems += [(row.number, f"{row.place}: {line}") for line in wrong]
        if problems:
            problems.sort(key=lambda problem: problem[0])
            lines = [line for _, line in problems]
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            raise DataError(f"{self.source}: {lines[0]}{more}", lines)
        return found

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
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place} is not UTF-8 (byte 0x{line[error.start]:02x}); convert it to UTF-8"
            ) from None
        if self._admits(text):
            found.append(Query(text, place))
        elif self._section.empty_texts == "refuse":
            raise DataError(f"{place}: {_EMPTY}")

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
