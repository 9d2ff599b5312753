"""The generated tasks: the same everywhere, balanced, and not decided by any one word."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from abft_mlx.data.generated import DEMO_TASK, TASKS, generate

NAMES = sorted(TASKS)
HELD_OUT = [name for name in NAMES if TASKS[name].held_out]


def test_enough_families_and_enough_of_them_held_out() -> None:
    assert len(NAMES) >= 12
    assert len(HELD_OUT) >= 5
    assert DEMO_TASK in HELD_OUT
    assert {len(task.labels) for task in TASKS.values()} >= {2, 3, 4, 5}


def test_held_out_labels_are_no_training_labels() -> None:
    training = {w for task in TASKS.values() if not task.held_out for w in task.labels}
    held_out = [w for name in HELD_OUT for w in TASKS[name].labels]
    assert not training & set(held_out)
    assert len(held_out) == len(set(held_out))


def test_labels_are_single_words_and_never_stand_in_a_text() -> None:
    labels = {w for task in TASKS.values() for w in task.labels}
    assert all(w.isalpha() and w.islower() for w in labels)
    used = {w for name in NAMES for text, _ in generate(name, 400, 3) for w in text.split()}
    assert not labels & used


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_are_in_the_space_in_label_form(name: str) -> None:
    task = TASKS[name]
    assert task.input_prefix.endswith(": ")
    assert task.label_prefix.endswith(":")


@pytest.mark.parametrize("name", NAMES)
def test_classes_share_no_word(name: str) -> None:
    counts = Counter(w for words in TASKS[name].classes.values() for w in set(words.all()))
    assert [w for w, n in counts.items() if n > 1] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_rows(name: str) -> None:
    rows = generate(name, 300, 7)
    assert rows == generate(name, 300, 7)
    assert rows[:100] == generate(name, 100, 7)
    assert rows != generate(name, 300, 8)


def test_the_rows_do_not_depend_on_the_process() -> None:
    code = f"from abft_mlx.data.generated import generate; print(generate({DEMO_TASK!r}, 20, 7))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{generate(DEMO_TASK, 20, 7)}\n"}


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_balanced_and_texts_unique(name: str) -> None:
    rows = generate(name, 3000, 7)
    texts = [text for text, _ in rows]
    assert len(set(texts)) == len(texts)
    expected = len(rows) / len(TASKS[name].labels)
    for count in Counter(label for _, label in rows).values():
        assert abs(count - expected) < 0.12 * expected


@pytest.mark.parametrize("name", NAMES)
def test_no_single_word_decides_but_all_words_together_do(name: str) -> None:
    numpy = pytest.importorskip("numpy")
    bayes = pytest.importorskip("sklearn.naive_bayes")
    counting = pytest.importorskip("sklearn.feature_extraction.text")
    rows = generate(name, 3000, 7)
    classes = len(TASKS[name].labels)
    gold = numpy.array([label for _, label in rows])
    present = counting.CountVectorizer(binary=True).fit_transform(t for t, _ in rows).toarray()

    def majority(chosen: numpy.ndarray) -> int:
        return int(numpy.bincount(gold[chosen], minlength=classes).max()) if chosen.any() else 0

    best = max(majority(column == 1) + majority(column == 0) for column in present.T) / len(rows)
    assert best < 1 / classes + 0.12
    together = bayes.BernoulliNB().fit(present[:2000], gold[:2000])
    assert 0.85 < together.score(present[2000:], gold[2000:]) < 0.999


def test_an_unknown_task_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        generate("no such task", 1, 0)
