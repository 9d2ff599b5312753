"""Labelled texts: where they come from, and the one pass of checks that all of them go through."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from abft_mlx import recipe
from abft_mlx.data import rows
from abft_mlx.data.rows import READERS, Row, Table, brief
from abft_mlx.errors import SHOWN, DataError, first_few
from abft_mlx.files import is_path
from abft_mlx.recipe import DataSection

BUILTIN_ROWS = 6000
BUILTIN_SEED = 7
MOST_CLASSES, MANY_CLASSES = 150, 50
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# A whole number as Python writes it.
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")
_NO_LABEL = "there is no label"
_EMPTY = "the text is empty; fix or remove the row, or set data.empty_texts: drop"


class Pair(tuple[str, int]):
    """A text and its class number, and the place where it was read, for messages."""

    place: str


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their class numbers."""

    texts: tuple[str, ...]  # exactly as read
    labels: tuple[int, ...]  # for each text an index into names
    names: tuple[str, ...]  # the classes
    source: str  # where the texts come from, for reports
    warnings: tuple[str, ...] = ()  # what is odd about them but no error, one line each
    # For each text where it was read, such as ``row 7 (line 9)``; empty if that is not known.
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
        return f"{self.source} {self.places[row] if self.places else f'text {row + 1}'}"

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


def load(section: DataSection) -> LabelledTexts:
    """Read the labelled texts that a recipe names.

    Raises:
        DataError: they cannot be found, or hold problems; the error carries every one of them.
    """
    source, labels = section.source, section.labels
    path = Path(source).expanduser()
    where = kind(source)
    if where == "builtin":
        from abft_mlx.data import generated

        name = generated.DEMO_TASK if source == "demo" else source
        names = generated.TASKS[name].labels
        pairs = enumerate(generated.generate(name, BUILTIN_ROWS, BUILTIN_SEED), 1)
        table = Table([Row(f"row {n}", text, names[label]) for n, (text, label) in pairs])
        return check(table, source, labels or names)
    if path.is_file() or path.suffix.lower() in READERS:
        table = rows.read(path, section.text, section.label)
        return check(table, source, labels, section.empty_texts)
    if path.is_dir():
        raise DataError(f"{source} is a folder; name a file in it ({', '.join(READERS)})")
    if is_path(source):
        raise DataError(f"{source}: no such file; a path is relative to the current folder")
    if where == "hub":
        from abft_mlx.data import hub

        return check(hub.read(section), hub.title(section), labels, section.empty_texts)
    if source in recipe.shipped():
        raise DataError(
            f"Unknown data.source {source!r}. {source} is a recipe: abft-mlx finetune {source}"
        )
    tasks = ["demo", *builtin_tasks()]
    near = difflib.get_close_matches(source, tasks, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise DataError(
        f"Unknown data.source {source!r}. {hint}Use a file ({', '.join(READERS)}), a data "
        f"set of the hub (owner/name) or a built-in task ({', '.join(tasks)})"
    )


def kind(source: str) -> str:
    """Where `load` looks for texts: "builtin", "file" or "hub"."""
    if source == "demo" or source in builtin_tasks():
        return "builtin"
    path = Path(source).expanduser()
    local = path.exists() or path.suffix.lower() in READERS
    return "hub" if not local and _HUB_NAME.fullmatch(source) else "file"


def builtin_tasks() -> dict[str, Any]:
    """The built-in tasks by name."""
    from abft_mlx.data import generated

    return dict(generated.TASKS)


def check(
    table: Table, source: str, labels: Sequence[str] | None, empty_texts: str = "refuse"
) -> LabelledTexts:
    """The texts of a table; an error carries every problem of every row.

    Integer labels without names are named "0", "1", ...: words for a prompt that few tokenizers
    hold as one token after a space, so such data want ``prompt.label_words``.

    Args:
        table: rows as read, with the problems of reading.
        source: where they were read, for messages.
        labels: class names in order, or None to take them from the table.
        empty_texts: refuse, drop or keep.
    """
    problems, warnings = list(table.problems), []
    words = [label_word(row.label) for row in table.rows]
    names = tuple(labels or table.names or ())
    classless = ""
    if not names:
        names, classless = _distinct([word for word, reason in words if not reason])
    problems += [classless] if classless else []
    index = {name: number for number, name in enumerate(names)}
    if (labels or table.names) and not any(map(_WHOLE.fullmatch, names)):
        numbers = {text: n for n in range(len(names)) for text in (str(n), f"{n}.0")}
        index = {**numbers, **index}
    good: list[tuple[str, int, str]] = []
    padded, empty = [], 0
    for row, (word, reason) in zip(table.rows, words, strict=True):
        wrong = row.problem or rows.text_problem(row.text)
        if isinstance(row.text, str) and not row.text.strip() and empty_texts != "keep":
            empty += 1
            if empty_texts == "drop":
                continue
            wrong = wrong or _EMPTY
        lines = [wrong] if wrong else []
        if not row.problem:
            if reason and not (wrong and reason == _NO_LABEL):  # an empty row is one problem
                lines.append(reason)
            elif not reason and not classless and word not in index:
                lines.append(_unknown(word, names))
            if isinstance(row.label, str) and row.label != row.label.strip():
                padded.append(row.place)
        problems += [f"{row.place}: {line}" for line in lines]
        if not lines and word in index:
            good.append((row.text, index[word], row.place))
    counts = Counter(label for _, label, _ in good)
    if not problems and len(counts) < 2:
        only = f"every label is {names[min(counts)]!r}; a classifier needs at least two classes"
        problems.append(only if counts else "no rows are left")
    if empty and empty_texts == "drop":
        warnings.append(f"rows left out because their text is empty: {empty}")
    if padded:
        warnings.append(f"labels with spaces around them were read without: {first_few(padded)}")
    absent = [repr(name) for label, name in enumerate(names) if not counts[label]]
    if absent:
        warnings.append(f"no row has label {first_few(absent)}")
    warnings += _unlikely(names) + _repeated(good, names)
    if problems:
        raise rows.refusal(source, problems)
    texts, indices, places = zip(*good, strict=True)
    return LabelledTexts(texts, indices, names, source, tuple(warnings), places)


def _distinct(words: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The classes that the labels themselves name, and why they cannot be classes."""
    distinct = set(words)
    # Labels of a classifier come again; more than a few that mostly do not are something else.
    rarely = len(distinct) > MANY_CLASSES and 2 * len(distinct) > len(words)
    if rarely or len(distinct) > MOST_CLASSES:
        examples = ", ".join(brief(word) for word in sorted(distinct)[:3])
        return (), (
            f"{len(distinct)} distinct labels ({examples}, ...) look like free text or numbers, "
            "not classes; check --label-column (data.label), or list the classes in data.labels"
        )
    numbers = all(map(_WHOLE.fullmatch, distinct))
    return tuple(sorted(distinct, key=int if numbers else None)), ""


def _unknown(word: str, names: Sequence[str]) -> str:
    """The line for a label that names no class."""
    lowered = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(word.lower(), lowered, n=1)
    guess = f" (did you mean {lowered[near[0]]!r}?)" if near else ""
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return (
        f"label {brief(word)} is not one of {shown}{guess}; fix the row or add the label to "
        "data.labels"
    )


def label_word(value: Any) -> tuple[str, str]:
    """A label as a word (numbers and flags written out, without spaces around it), and its problem.

    One of the two is empty.
    """
    if value is rows.MISSING or value is None:
        return "", _NO_LABEL
    if isinstance(value, bool):
        return str(value).lower(), ""
    if isinstance(value, float):
        if math.isnan(value):
            return "", "there is no label (NaN)"
        if not value.is_integer():
            return "", f"label {value!r} is a fraction, not a class"
    if isinstance(value, (int, float)):
        return str(int(value)), ""
    if not isinstance(value, str):
        return "", f"the label is {brief(value)}, which is neither a word nor a whole number"
    word = value.strip()
    return word, (rows.encoding_problem(word, "the label") or "") if word else _NO_LABEL


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
    for text, label, place in good:
        rows_of[text].append((label, place))
    again = [some for some in rows_of.values() if len(some) > 1]
    if not again:
        return []
    extra = sum(len(some) - 1 for some in again)
    groups = first_few([first_few([place for _, place in some], "=") for some in again])
    warnings = [f"{extra} rows repeat an earlier text exactly: {groups}"]
    for some in [some for some in again if len({label for label, _ in some}) > 1][:SHOWN]:
        shown = first_few([f"{place} {names[label]!r}" for label, place in some])
        warnings.append(f"the same text has different labels: {shown}")
    return warnings


def listed(values: Any, what: str) -> list[Any]:
    """A one-dimensional collection (list, tuple, array, column of a table) as a list."""
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
    """The name of a class whose labels are words, whole numbers or truth values."""
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
    """
    if len(texts) != len(labels):
        raise DataError(f"{source}: {len(texts)} texts and {len(labels)} labels; give one for each")
    items = enumerate(zip(texts, labels, strict=True))
    table = Table([Row(f"item {number}", text, label) for number, (text, label) in items])
    return check(table, source, names, empty_texts)
