"""Labelled texts, and when two texts are the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


class Pair(tuple[str, int]):
    """A text and its class number, and the place where it was read, for messages."""

    place: str


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their class numbers.

    Attributes:
        texts: the inputs, exactly as read.
        labels: for each text an index into names.
        names: the classes.
        source: where the texts come from, for reports.
        warnings: what is odd about them but no error, one line each.
        places: for each text where it was read, such as ``row 7 (line 9)``; empty if not known.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    source: str
    warnings: tuple[str, ...] = ()
    places: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, rows: Sequence[int]) -> LabelledTexts:
        """The texts at these rows, in this order."""
        return replace(
            self,
            texts=tuple(self.texts[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows),
            warnings=(),
            places=tuple(self.places[row] for row in rows) if self.places else (),
        )

    def place(self, row: int) -> str:
        """Where a text was read, for messages."""
        return (
            f"{self.source} {self.places[row]}" if self.places else f"{self.source} text {row + 1}"
        )

    def pairs(self) -> list[Pair]:
        """Text and class number of every row."""
        pairs = [Pair(pair) for pair in zip(self.texts, self.labels, strict=True)]
        for row, pair in enumerate(pairs):
            pair.place = self.place(row)
        return pairs

    def fingerprint(self) -> str:
        """Hex SHA-256 of names, texts and labels in order; not of where they were read."""
        content = json.dumps([self.names, self.texts, self.labels], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def class_counts(self) -> dict[str, int]:
        """Rows of each class, classes without any included."""
        counts = Counter(self.labels)
        return {name: counts[index] for index, name in enumerate(self.names)}


def fold(text: str) -> str:
    """A text without case and punctuation, to find the same sentence in another data set."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip() or text
