"""From rows as read to labelled texts: every problem of a data set found in one pass."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abft_mlx.data._rows import MISSING, Table
from abft_mlx.data.texts import LabelledTexts
from abft_mlx.errors import SHOWN, DataError, first_few

MOST_CLASSES, MANY_CLASSES = 150, 50
NO_LABEL = "there is no label"


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
        if self.texts is not None:
            return self.texts
        more = len(self.problems) - 1
        tail = f" (and {more} more problem{'s' * (more > 1)})" if more else ""
        raise DataError(f"{self.source}: {self.problems[0]}{tail}", self.problems)


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
    values = [label_word(row.label) for row in table.rows]
    space = _Space.of([v for v in values if not isinstance(v, Bad)], labels, table.names)
    if space.problem:
        problems.append((0, space.problem))
    good: list[tuple[str, int, str]] = []
    padded: list[str] = []
    empty = 0
    for row, label in zip(table.rows, values, strict=True):
        text = row.text
        found = text_problems(text)
        blank = isinstance(text, str) and not text.strip()
        if blank and empty_texts != "keep":
            empty += 1
            if empty_texts == "drop":
                continue
            found.append("the text is empty; fix or remove the row, or set data.empty_texts: drop")
        index = None
        if isinstance(label, Bad):
            # An empty row is one problem.
            if not (found and label.reason == NO_LABEL):
                found.append(label.reason)
        elif not space.problem:
            index = space.index(label)
            if index is None:
                found.append(space.unknown(label))
        if isinstance(row.label, str) and row.label != row.label.strip():
            padded.append(row.place)
        if found:
            problems.extend((row.number, f"{row.place}: {line}") for line in found)
        elif index is not None:
            good.append((text, index, row.place))
    if empty and empty_texts == "drop":
        warnings.append(f"rows left out because their text is empty: {empty}")
    if padded:
        warnings.append(f"labels with spaces around them were read without: {first_few(padded)}")
    counts = {name: sum(index == i for _, index, _ in good) for i, name in enumerate(space.names)}
    if not problems:
        problems += _few_classes(counts)
    absent = [repr(name) for name, count in counts.items() if not count]
    if absent:
        warnings.append(f"no row has label {first_few(absent)}")
    warnings += _unlikely(space.names)
    warnings += _repeated(good, space.names)
    problems.sort(key=lambda problem: problem[0])
    texts = None
    if not problems:
        texts = LabelledTexts(
            tuple(text for text, _, _ in good),
            tuple(index for _, index, _ in good),
            space.names,
            source,
            tuple(warnings),
        )
    lines = tuple(line for _, line in problems)
    return Report(source, len(table.rows), counts, lines, tuple(warnings), texts)


@dataclass(frozen=True)
class Bad:
    """A label that cannot be one, and why."""

    reason: str


@dataclass(frozen=True)
class _Space:
    """The classes of a data set, and how its labels name them."""

    names: tuple[str, ...]
    numbered: bool = False
    problem: str | None = None

    @classmethod
    def of(
        cls, values: Sequence[str], given: Sequence[str] | None, carried: Sequence[str] | None
    ) -> _Space:
        """Classes from the names given, those the file carries, or the labels themselves.

        Integer labels without names are named "0", "1", ...: words for a prompt that few
        tokenizers hold as one token after a space, so such data want prompt.label_words.
        """
        names = tuple(given or carried or ())
        if names:
            return cls(names, numbered=not any(_is_whole(name) for name in names))
        distinct = set(values)
        # Labels of a classifier come again; more than a few that mostly do not are something else.
        rarely = len(distinct) > MANY_CLASSES and 2 * len(distinct) > len(values)
        if rarely or len(distinct) > MOST_CLASSES:
            examples = ", ".join(_brief(value) for value in sorted(distinct)[:3])
            return cls(
                (),
                problem=f"{len(distinct)} distinct labels ({examples}, ...) look like free text "
                "or numbers, not classes; check --label-column (data.label), or list the classes "
                "in data.labels",
            )
        if all(_is_whole(value) for value in distinct):
            return cls(tuple(str(number) for number in sorted(int(value) for value in distinct)))
        return cls(tuple(sorted(distinct)))

    def index(self, value: str) -> int | None:
        """The class of a label: its name, or its number where no name is a number itself."""
        if value in self.names:
            return self.names.index(value)
        number = value.removesuffix(".0")
        if self.numbered and _is_whole(number) and 0 <= int(number) < len(self.names):
            return int(number)
        return None

    def unknown(self, value: str) -> str:
        """The line for a label that names no class."""
        shown = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
        near = difflib.get_close_matches(value.lower(), [n.lower() for n in self.names], n=1)
        guess = f" (did you mean {_original(near[0], self.names)!r}?)" if near else ""
        return (
            f"label {_brief(value)} is not one of {shown}{guess}; fix the row or add the label to "
            "data.labels"
        )


def _original(lowered: str, names: Sequence[str]) -> str:
    return next(name for name in names if name.lower() == lowered)


def _is_whole(value: str) -> bool:
    digits = value[1:] if value.startswith("-") else value
    return digits.isascii() and digits.isdigit() and str(int(value[:20])) == value


def label_word(value: Any) -> str | Bad:
    """A label as a word: numbers and flags are written out, spaces around it taken off."""
    if value is MISSING or value is None:
        return Bad(NO_LABEL)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return Bad("there is no label (NaN)")
        if value.is_integer():
            return str(int(value))
        return Bad(f"label {value!r} is a fraction, not a class")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        word = value.strip()
        if not word:
            return Bad(NO_LABEL)
        return Bad("the label holds half a character") if _lone_surrogate(word) else word
    return Bad(f"the label is {_brief(value)}, which is neither a word nor a whole number")


def text_problems(text: Any) -> list[str]:
    """What keeps a value from being a text, one line each; an empty one passes."""
    if text is MISSING or text is None:
        return ["there is no text"]
    if not isinstance(text, str):
        return [f"the text is {_brief(text)}, which is not a string"]
    return ["the text holds half a character (a lone surrogate)"] if _lone_surrogate(text) else []


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _few_classes(counts: dict[str, int]) -> list[tuple[int, str]]:
    used = [name for name, count in counts.items() if count]
    if len(used) == 1:
        return [(0, f"every label is {used[0]!r}; a classifier needs at least two classes")]
    return [] if used else [(0, "no rows are left")]


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
    seen: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for text, index, place in good:
        seen[text].append((index, place))
    warnings = []
    again = [rows for rows in seen.values() if len(rows) > 1]
    if again:
        extra = sum(len(rows) - 1 for rows in again)
        groups = first_few([first_few([place for _, place in rows], "=") for rows in again])
        warnings.append(f"{extra} rows repeat an earlier text exactly: {groups}")
    for rows in [rows for rows in again if len({index for index, _ in rows}) > 1][:SHOWN]:
        listed = first_few([f"{place} {names[index]!r}" for index, place in rows])
        warnings.append(f"the same text has different labels: {listed}")
    return warnings
