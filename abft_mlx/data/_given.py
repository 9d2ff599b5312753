"""Labelled texts that a Python program hands over, and their division for training alone.

Where a file of texts is divided for training and for measuring, a program that measures by itself
(scikit-learn's ``cross_val_score``) gives training texts only: all of them may train.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from abft_mlx.data._check import Bad, check, label_word, text_problems
from abft_mlx.data._rows import Row, Table
from abft_mlx.data.generator import Generator
from abft_mlx.data.queries import Query
from abft_mlx.data.texts import LabelledTexts, Splits
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection


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


def for_training(texts: LabelledTexts, section: DataSection) -> Splits:
    """Divide texts into training and validation; nothing is kept from training for tests.

    ``validation_rows`` are drawn first where they are asked for, then up to ``training_rows``.

    Raises:
        DataError: validation would leave no training rows.
    """
    count = len(texts)
    if section.validation_rows >= count:
        raise DataError(
            f"{texts.source}: data.validation_rows {section.validation_rows} leave nothing of "
            f"{count} texts to train on; lower it, or give more texts"
        )
    kept = min(count - section.validation_rows, section.training_rows)
    drawn = Generator(section.seed).draw(count, section.validation_rows + kept)
    validation, training = drawn[: section.validation_rows], drawn[section.validation_rows :]
    rows: dict[str, tuple[int, ...]] = {
        "training": tuple(training),
        "validation": tuple(validation),
        "demonstrations": (),
        "test": (),
    }
    return Splits(
        texts.subset(training), texts.subset(validation), texts.subset(()), texts.subset(()), rows
    )
