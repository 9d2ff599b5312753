"""Texts and labels that a Python program hands over, checked like those of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from abft_mlx.data._check import Bad, check, label_word, text_problems
from abft_mlx.data._rows import Row, Table
from abft_mlx.data.queries import Query
from abft_mlx.data.texts import LabelledTexts
from abft_mlx.errors import DataError


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's own value; anything else as it is."""
    return value.item() if hasattr(value, "dtype") and hasattr(value, "item") else value


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


def word(label: Any) -> str:
    """The name of a class whose labels are words, whole numbers or truth values.

    Raises:
        DataError: it can be no label.
    """
    label = _plain(label)
    found = label_word(label)
    if isinstance(found, Bad):
        raise DataError(f"label {label!r:.40} cannot be used: {found.reason}")
    return found


def given(
    texts: Sequence[Any],
    labels: Sequence[Any],
    names: Sequence[str] | None,
    source: str,
    empty_texts: str = "refuse",
) -> LabelledTexts:
    """Check texts and labels as those of a file are checked.

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
    rows = [
        Row(number, f"item {number}", text, label)
        for number, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    return check(Table(rows=rows), source, names, empty_texts).require()


def queries_of(texts: Sequence[Any], source: str) -> list[Query]:
    """Texts without labels, checked.

    Raises:
        DataError: some cannot be used; the error carries every one of them.
    """
    problems = [
        f"item {number}: {line}"
        for number, text in enumerate(texts)
        for line in text_problems(text)
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{source}: {problems[0]}{more}", problems)
    return [Query(text, f"{source} item {number}") for number, text in enumerate(texts)]
