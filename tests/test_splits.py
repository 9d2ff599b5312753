"""Golden values of the protocol: rows of every part, and the sampler of demonstrations."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paper_sets import SETS

from abft_mlx.data import (
    Generator,
    LabelledTexts,
    demonstration_rows,
    fold,
    load,
    split,
    training_rows,
)
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection


def sha256(value: object) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def texts(n: int, classes: int = 2) -> LabelledTexts:
    return LabelledTexts(
        tuple(f"text {i}" for i in range(n)),
        tuple(i % classes for i in range(n)),
        tuple(f"class {c}" for c in range(classes)),
        "made.csv",
    )


def section(training: int, validation: int, demonstrations: int, test: int) -> DataSection:
    return DataSection(
        training_rows=training,
        validation_rows=validation,
        demonstration_rows=demonstrations,
        test_rows=test,
    )


def test_generator_first_numbers_by_hand() -> None:
    generator = Generator(42)
    first = (1664525 * 42 + 1013904223) % 2**32
    second = (1664525 * first + 1013904223) % 2**32
    assert generator.random() == first / 2**32
    assert generator.integers(10, 20) == 10 + int(10 * second / 2**32)
    with pytest.raises(ValueError, match="without repetition"):
        Generator().draw(3, 4)


@pytest.mark.parametrize(("items", "n"), [(1, 1), (8192, 8192), (8193, 8193), (40_000, 3000)])
def test_a_draw_takes_items_out_of_what_is_left(items: int, n: int) -> None:
    numbers, left = Generator(5), list(range(items))
    assert Generator(5).draw(items, n) == [
        left.pop(int(numbers.random() * len(left))) for _ in range(n)
    ]


@pytest.mark.parametrize("name", SETS)
def test_splits_and_sampler_are_the_golden_ones(name: str, shared: Path) -> None:
    golden = json.loads((shared / "reference" / "staicc_reference.json").read_text())[name]
    sizes = golden["split_sizes"]
    data = DataSection(
        source=str(shared / "data" / f"{name}.jsonl"),
        demonstration_rows=sizes["demonstration"],
        empty_texts="keep",
    )
    parts = split(load(data), data)
    for part, key in (
        ("training", "calibration"),
        ("demonstrations", "demonstration"),
        ("test", "test"),
    ):
        rows = list(parts.rows[part])
        assert rows[:10] == golden[key]["first10_row_indices"]
        assert sha256(rows) == golden[key]["sha256_of_compact_json_index_list"]
        counts = {str(k): n for k, n in Counter(getattr(parts, part).labels).items()}
        assert counts == golden[key]["class_histogram"]
    sampler = demonstration_rows(512, 2, len(parts.demonstrations), 4)
    assert [list(row) for row in sampler[:5]] == golden["demo_sampler_k4"]["first5"]
    assert sha256([list(row) for row in sampler]) == golden["demo_sampler_k4"]["sha256"]
    for part, key in (("training", "calibration"), ("demonstrations", "demonstration")):
        count = golden[f"test_texts_also_in_{key}"]
        lines = [line for line in parts.warnings if f"also occur in {part}" in line]
        assert lines == [f"{count} of 512 {line.partition(' of 512 ')[2]}" for line in lines]
        assert bool(lines) == bool(count)


@given(
    st.integers(15, 400),
    st.integers(5, 300),
    st.integers(0, 100),
    st.integers(5, 300),
    st.integers(5, 100),
)
def test_parts_are_disjoint_and_each_has_enough(
    n: int, training: int, validation: int, demonstrations: int, test: int
) -> None:
    data = section(training, validation, demonstrations, test)
    whole = texts(n)
    if n < 20 and validation:
        return
    parts = split(whole, data)
    used = [row for rows in parts.rows.values() for row in rows]
    assert len(used) == len(set(used)) <= n
    for part in ("training", "demonstrations", "test"):
        assert len(getattr(parts, part)) >= 5
        assert getattr(parts, part).texts == tuple(whole.texts[r] for r in parts.rows[part])
    assert bool(len(parts.validation)) == bool(validation)
    if n >= training + validation + demonstrations + test:
        assert len(parts.training) == training
        assert len(parts.test) == test
        assert not parts.warnings
    else:
        assert "were asked for" in parts.warnings[0]


def test_a_small_set_gives_up_demonstrations_first() -> None:
    for n, sizes in ((2264, (1024, 728, 512)), (300, (150, 75, 75))):
        parts = split(texts(n), DataSection())
        assert (len(parts.training), len(parts.demonstrations), len(parts.test)) == sizes
    with pytest.raises(DataError, match=r"made\.csv: 14 rows are too few: 15 are needed"):
        split(texts(14), DataSection())
    with pytest.raises(DataError, match="training_rows is 4: a training prompt needs 5"):
        split(texts(100), section(4, 0, 10, 10))


def test_rows_of_prompts() -> None:
    rows = training_rows(3, 50, 4, seed=42)
    assert rows[2] == tuple(random.Random(44).sample(range(50), 5))
    assert all(len(set(row)) == 4 for row in demonstration_rows(50, 2, 4, 4))
    assert {index for row in demonstration_rows(50, 2, 3, 4) for index in row} == {0, 1, 2}


def own(**sizes: int) -> DataSection:
    return DataSection(**{"holdout": "stratified", **sizes})


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=12),
    st.integers(0, 40),
    st.integers(1, 60),
    st.integers(3, 300),
    st.integers(0, 3),
    st.data(),
)
def test_own_texts_are_divided_class_by_class(
    counts: list[int], validation: int, test: int, training: int, seed: int, draw: st.DataObject
) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    n = len(labels)
    if n < 7:
        return
    # Some texts are copies of others, with the same label or another.
    copied = draw.draw(
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=3)
    )
    lines = [f"text {row}" for row in range(n)]
    for one, other in copied:
        lines[one] = lines[other].upper() + "."
    names = tuple(f"class {label}" for label in range(len(counts)))
    whole = LabelledTexts(tuple(lines), tuple(labels), names, "made.csv")
    section = own(validation_rows=validation, test_rows=test, training_rows=training, seed=seed)
    parts = split(whole, section, 2)
    sizes = {part: len(rows) for part, rows in parts.rows.items()}
    assert 1 <= sizes["test"] <= min(test, n // 4)
    assert sizes["validation"] <= min(validation, (n - sizes["test"]) // 4)
    assert 3 <= sizes["training"] <= training
    assert parts.demonstrations == parts.training
    assert parts == split(whole, section, 2)
    different = {part: {fold(text) for text in getattr(parts, part).texts} for part in parts.rows}
    for part, other in (("training", "validation"), ("training", "test"), ("validation", "test")):
        assert not different[part] & different[other]
    if copied:
        return
    # Without copies no row is lost, and every class is in every part as far as it goes.
    assert sum(sizes.values()) - sizes["demonstrations"] == n or sizes["training"] == training
    found = {part: getattr(parts, part).class_counts() for part in parts.rows}
    for name, count in zip(names, counts, strict=True):
        if count > 1 and training >= len(counts):
            assert found["training"][name]
        if count >= 4 and sizes["test"] >= len(counts):
            assert found["test"][name]
        if min(counts) >= 4 and sizes["test"] >= len(counts):
            assert abs(found["test"][name] - count * sizes["test"] / n) < max(2, len(counts))


def test_twenty_rows_are_enough_and_a_class_without_test_rows_is_named() -> None:
    for classes in (2, 3, 4):
        parts = split(texts(20, classes), own(validation_rows=128), 4)
        assert [len(parts.rows[one]) for one in ("training", "validation", "test")] == [12, 3, 5]
        assert not parts.warnings
        assert min(parts.training.class_counts().values()) >= 2
    # Validation gives way before there are too few rows to train.
    parts = split(texts(20, 4), own(validation_rows=128), 12)
    assert [len(parts.training), len(parts.validation), len(parts.test)] == [13, 2, 5]
    with pytest.raises(DataError, match=r"20 rows are too few.*prompt\.demonstrations.*--final"):
        split(texts(20, 4), own(), 19)
    labels = (0,) * 40 + (1,) * 20 + (2,)
    whole = LabelledTexts(tuple(map(str, range(61))), labels, ("a", "b", "rare"), "made.csv")
    parts = split(whole, own(validation_rows=8))
    assert parts.test.class_counts() == {"a": 10, "b": 5, "rare": 0}
    assert [line for line in parts.warnings if "no test rows have label 'rare'," in line]


def test_copies_of_test_texts_do_not_train() -> None:
    lines = tuple(f"Text {row % 40}" + "!" * (row // 40) for row in range(120))
    whole = LabelledTexts(lines, tuple(row % 2 for row in range(120)), ("a", "b"), "made.csv")
    parts = split(whole, own(validation_rows=5))
    assert (len(parts.test), len(parts.validation), len(parts.training)) == (10, 5, 75)
    assert any("30 rows were dropped from training" in line for line in parts.warnings)


def test_a_final_run_trains_on_everything() -> None:
    whole = texts(3000, 3)
    section = own().model_copy(update={"holdout": "none"})
    parts = split(whole, section)
    assert sorted(parts.rows["training"]) == list(range(3000))
    assert not len(parts.test)
    assert not len(parts.validation)
    assert not any("no test rows have" in line for line in parts.warnings)
    parts = split(whole, section.model_copy(update={"validation_rows": 300}))
    assert parts.validation.class_counts() == {f"class {label}": 100 for label in range(3)}
    assert sorted(parts.rows["training"] + parts.rows["validation"]) == list(range(3000))
