"""The division of labelled texts into disjoint parts: as the protocol draws them, or by class."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from abft_mlx.data.sampling import Generator
from abft_mlx.data.texts import LabelledTexts, fold
from abft_mlx.errors import DataError, first_few
from abft_mlx.recipe import DataSection

PARTS = ("training", "validation", "demonstrations", "test")


@dataclass(frozen=True)
class Splits:
    """Parts of one set of labelled texts, without a common row but for demonstrations."""

    training: LabelledTexts  # what training prompts are made of
    validation: LabelledTexts  # queries that choose the best adapter; empty by default
    # What evaluation takes demonstrations from: training, unless data.holdout is protocol.
    demonstrations: LabelledTexts
    test: LabelledTexts  # queries that are evaluated
    rows: dict[str, tuple[int, ...]]  # for each part, the row numbers (from 0) in the whole set
    warnings: tuple[str, ...] = ()


def split(texts: LabelledTexts, section: DataSection, demonstrations: int = 4) -> Splits:
    """Divide the rows as ``data.holdout`` says, by ``data.seed`` alone.

    protocol makes one draw: training, validation, demonstrations, test. With the sizes of the paper
    (no validation rows) and seed 42 these are StaICC's own splits. A set too small for these sizes
    first gives up demonstration rows, the largest part, down to the number of test rows; then all
    parts shrink in proportion.

    stratified divides class by class: at most a quarter of the different texts, and at most
    ``test_rows``, are for testing; at most a quarter of the others, and at most
    ``validation_rows``, for validation; up to ``training_rows`` of the rest train. A text is in one
    part only: its copies (case and punctuation aside) are dropped, or train together. Every class
    with two different texts has training rows, and one with four has test rows where ``test_rows``
    allow.

    none is like stratified, but has no test rows, and trains on all rows but those for validation.

    Args:
        texts: the whole set.
        section: how to divide, the sizes of the parts, and the seed.
        demonstrations: k; every part that prompts are made of alone has at least k + 1 rows.

    Raises:
        DataError: too few rows.
    """
    if section.holdout == "protocol":
        return _protocol(texts, section, demonstrations)
    return _by_class(texts, section, demonstrations)


def all_test(texts: LabelledTexts) -> Splits:
    """Every row a test row: for labelled texts that a run was not trained on."""
    return _splits(texts, {"test": range(len(texts))})


def _splits(texts: LabelledTexts, rows: dict[str, Sequence[int]]) -> Splits:
    """The parts with these rows."""
    numbers = {part: tuple(rows.get(part, ())) for part in PARTS}
    training, validation, demonstrations, test = (texts.subset(numbers[part]) for part in PARTS)
    return Splits(training, validation, demonstrations, test, numbers)


def _protocol(texts: LabelledTexts, section: DataSection, demonstrations: int) -> Splits:
    """The parts as StaICC draws them."""
    wanted = {
        "training": section.training_rows,
        "validation": section.validation_rows,
        "demonstrations": section.demonstration_rows,
        "test": section.test_rows,
    }
    sizes = _fit(wanted, len(texts), demonstrations + 1, texts.source)
    drawn = iter(Generator(section.seed).draw(len(texts), sum(sizes.values())))
    parts = _splits(texts, {part: list(islice(drawn, sizes[part])) for part in PARTS})
    warnings = []
    if sizes != wanted:
        listed = ", ".join(f"{part} {size}" for part, size in sizes.items() if size)
        warnings.append(
            f"{texts.source} has {len(texts)} rows where {sum(wanted.values())} were asked for; "
            f"using {listed}"
        )
    tested = [fold(text) for text in parts.test.texts]
    for part in PARTS[:-1]:
        others = {fold(text) for text in getattr(parts, part).texts}
        count = sum(text in others for text in tested)
        if count:
            warnings.append(
                f"{count} of {len(tested)} test texts also occur in {part} (case and punctuation "
                "aside)"
            )
    return replace(parts, warnings=tuple(warnings))


def _fit(wanted: dict[str, int], available: int, least: int, source: str) -> dict[str, int]:
    """Sizes that fit into the available rows, none that is wanted below the least."""
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
    sizes["demonstrations"] -= min(excess, max(0, sizes["demonstrations"] - sizes["test"]))
    total = sum(sizes.values())
    if total > available:
        sizes = {p: max(floors[p], size * available // total) for p, size in sizes.items()}
    while sum(sizes.values()) > available:
        sizes[max(PARTS, key=lambda part: sizes[part] - floors[part])] -= 1
    return sizes


def _by_class(texts: LabelledTexts, section: DataSection, demonstrations: int) -> Splits:
    """The parts of holdout stratified and none."""
    rng = random.Random(section.seed)
    stratified = section.holdout == "stratified"
    copies: dict[str, list[int]] = defaultdict(list)
    for row in rng.sample(range(len(texts)), len(texts)):
        copies[fold(texts.texts[row])].append(row)
    # One row of each text, by its class.
    left = _of_classes(texts, [rows[0] for rows in copies.values()])
    spare = max(0, len(copies) - demonstrations - 1)
    test = min(section.test_rows, len(copies) // 4, spare) if stratified else 0
    if stratified and not test:
        fewer = ", lower prompt.demonstrations" if demonstrations > 1 else ""
        raise DataError(
            f"{texts.source}: {len(texts)} rows are too few to hold out test rows; add rows"
            f"{fewer}, or train on all of them (--final, data.holdout none)"
        )
    validation = min(section.validation_rows, (len(copies) - test) // 4, spare - test)
    chosen = {"test": _take(left, test), "validation": _take(left, validation)}
    held_out = {row for some in chosen.values() for row in some}
    training = [row for rows in copies.values() if rows[0] not in held_out for row in rows]
    dropped = len(texts) - len(held_out) - len(training)
    if stratified:
        training = _take(_of_classes(texts, training), section.training_rows, sure=1, keep=0)
    chosen["training"] = chosen["demonstrations"] = training
    for part in ("test", "validation", "training"):
        rng.shuffle(chosen[part])
    parts = _splits(texts, {**chosen})
    warnings = []
    if dropped:
        warnings.append(
            f"{dropped} rows were dropped from training: the test or validation rows have the "
            "same text (case and punctuation aside)"
        )
    tested = parts.test.class_counts()
    lacking = [repr(name) for name, n in texts.class_counts().items() if n and not tested[name]]
    if test and lacking:
        warnings.append(
            f"no test rows have label {first_few(lacking)}, so these classes are not measured; "
            "add rows with them"
        )
    return replace(parts, warnings=tuple(warnings))


def _of_classes(texts: LabelledTexts, rows: Sequence[int]) -> dict[int, list[int]]:
    """The rows of each class."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        by_class[texts.labels[row]].append(row)
    return by_class


def _take(left: dict[int, list[int]], n: int, *, sure: int = 4, keep: int = 1) -> list[int]:
    """Take n rows out of the classes, in proportion to what is left of each.

    A class keeps ``keep`` rows, and gives one at least if it has ``sure`` rows and n allows.
    """
    most = {label: len(rows) - keep for label, rows in left.items()}
    n = min(n, sum(most.values()))
    total = sum(map(len, left.values()))
    share = {label: n * len(rows) / total for label, rows in left.items()}
    size = {
        label: min(max(int(share[label]), int(len(rows) >= sure)), most[label])
        for label, rows in left.items()
    }
    while sum(size.values()) < n:
        size[
            max(size, key=lambda label: (size[label] < most[label], share[label] - size[label]))
        ] += 1
    while sum(size.values()) > n:
        size[max(size, key=lambda label: (size[label] > 1, size[label] - share[label]))] -= 1
    taken = [row for label, rows in left.items() for row in rows[: size[label]]]
    for label, rows in left.items():
        del rows[: size[label]]
    return taken
