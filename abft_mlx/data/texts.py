"""Labelled texts, and their division into disjoint parts by the protocol's generator."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from abft_mlx.data.generator import Generator
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection

PARTS = ("training", "validation", "demonstrations", "test")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their class numbers.

    Attributes:
        texts: the inputs, exactly as read.
        labels: for each text an index into names.
        names: the classes.
        source: where the texts come from, for reports.
        warnings: what is odd about them but no error, one line each.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    source: str
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, rows: Sequence[int]) -> LabelledTexts:
        """The texts at these rows, in this order."""
        return replace(
            self,
            texts=tuple(self.texts[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows),
            warnings=(),
        )

    def pairs(self) -> list[tuple[str, int]]:
        """Text and class number of every row."""
        return list(zip(self.texts, self.labels, strict=True))

    def fingerprint(self) -> str:
        """Hex SHA-256 of names, texts and labels in order; not of where they were read."""
        content = json.dumps([self.names, self.texts, self.labels], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def class_counts(self) -> dict[str, int]:
        """Rows of each class, classes without any included."""
        counts = Counter(self.labels)
        return {name: counts[index] for index, name in enumerate(self.names)}


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of one set of labelled texts.

    Attributes:
        training: what training prompts are made of.
        validation: queries that choose the best adapter; empty unless asked for.
        demonstrations: what evaluation takes its demonstrations from.
        test: queries that are evaluated.
        rows: for each part, the row numbers (from 0) in the whole set.
        warnings: parts smaller than asked for, and texts that occur in two parts.
    """

    training: LabelledTexts
    validation: LabelledTexts
    demonstrations: LabelledTexts
    test: LabelledTexts
    rows: dict[str, tuple[int, ...]]
    warnings: tuple[str, ...] = ()


def split(texts: LabelledTexts, section: DataSection, demonstrations: int = 4) -> Splits:
    """Divide the rows in one seeded draw: training, validation, demonstrations, test.

    With the sizes of the paper (no validation rows) and seed 42 these are StaICC's own splits. A
    set too small for the sizes asked for first gives up demonstration rows, of which most are asked
    for, down to the number of test rows; then all parts shrink in proportion.

    Args:
        texts: the whole set.
        section: the sizes asked for, and the seed.
        demonstrations: k; every part that is not empty gets at least k + 1 rows.

    Raises:
        DataError: too few rows.
    """
    wanted = {
        "training": section.training_rows,
        "validation": section.validation_rows,
        "demonstrations": section.demonstration_rows,
        "test": section.test_rows,
    }
    sizes = _fit(wanted, len(texts), demonstrations + 1, texts.source)
    drawn = Generator(section.seed).draw(len(texts), sum(sizes.values()))
    rows: dict[str, tuple[int, ...]] = {}
    for part in PARTS:
        rows[part] = tuple(drawn[: sizes[part]])
        del drawn[: sizes[part]]
    warnings = []
    if sizes != wanted:
        listed = ", ".join(f"{part} {sizes[part]}" for part in PARTS if sizes[part])
        warnings.append(
            f"{texts.source} has {len(texts)} rows where {sum(wanted.values())} were asked for; "
            f"using {listed}"
        )
    parts = {part: texts.subset(rows[part]) for part in PARTS}
    warnings += _shared(parts)
    return Splits(**parts, rows=rows, warnings=tuple(warnings))


def all_test(texts: LabelledTexts) -> Splits:
    """Every row a test row: for labelled texts that a run was not trained on."""
    none = texts.subset(())
    rows = {part: tuple(range(len(texts))) if part == "test" else () for part in PARTS}
    return Splits(none, none, none, texts, rows)


def _fit(wanted: dict[str, int], available: int, least: int, source: str) -> dict[str, int]:
    """Sizes that fit into the available rows, none that was asked for below the least."""
    if wanted["training"] < least:
        raise DataError(
            f"data.training_rows is {wanted['training']}: a training prompt needs {least} distinct "
            "rows, its demonstrations and its query; ask for more rows or fewer demonstrations"
        )
    sizes = dict(wanted)
    excess = sum(sizes.values()) - available
    if excess <= 0:
        return sizes
    floors = {part: min(least, size) for part, size in wanted.items()}
    if sum(floors.values()) > available:
        raise DataError(
            f"{source}: {available} rows are too few: {sum(floors.values())} are needed "
            f"({', '.join(f'{part} {size}' for part, size in floors.items() if size)}); "
            "add rows, or lower prompt.demonstrations"
        )
    spare = max(0, sizes["demonstrations"] - sizes["test"])
    sizes["demonstrations"] -= min(excess, spare)
    total = sum(sizes.values())
    if total > available:
        sizes = {p: max(floors[p], size * available // total) for p, size in sizes.items()}
    while sum(sizes.values()) > available:
        largest = max(PARTS, key=lambda part: sizes[part] - floors[part])
        sizes[largest] -= 1
    return sizes


def _shared(parts: dict[str, LabelledTexts]) -> list[str]:
    """A line for each part that has texts of the test part, case and punctuation aside."""
    warnings = []
    asked = [fold(text) for text in parts["test"].texts]
    for part in PARTS[:-1]:
        known = {fold(text) for text in parts[part].texts}
        count = sum(text in known for text in asked)
        if count:
            warnings.append(
                f"{count} of {len(asked)} test texts also occur in {part} (case and punctuation "
                "aside)"
            )
    return warnings


def fold(text: str) -> str:
    """A text without case and punctuation, to find the same sentence in another data set."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip() or text
