"""The generated tasks: the same everywhere, balanced, and not decided by any one word."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import BernoulliNB

from abft_mlx.data.generated import DEMO_TASK, TASKS, generate


def test_held_out_labels_are_no_training_labels_and_none_stands_in_a_text() -> None:
    held_out = [task for task in TASKS.values() if task.held_out]
    assert (len(TASKS), len(held_out), TASKS[DEMO_TASK].held_out) == (14, 6, True)
    labels = [word for task in TASKS.values() for word in task.labels]
    tested = [word for task in held_out for word in task.labels]
    training = {word for task in TASKS.values() if not task.held_out for word in task.labels}
    assert len(tested) == len(set(tested))
    assert not training & set(tested)
    used = {w for name in TASKS for text, _ in generate(name, 400, 3) for w in text.split()}
    assert not used & set(labels)


def test_the_rows_do_not_depend_on_the_process() -> None:
    code = f"from abft_mlx.data.generated import generate; print(generate({DEMO_TASK!r}, 20, 7))"
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == f"{generate(DEMO_TASK, 20, 7)}\n"
    assert generate(DEMO_TASK, 20, 7) == generate(DEMO_TASK, 30, 7)[:20]
    assert generate(DEMO_TASK, 20, 7) != generate(DEMO_TASK, 20, 8)


@pytest.mark.parametrize("name", TASKS)
def test_no_single_word_decides_but_all_words_together_do(name: str) -> None:
    task, rows = TASKS[name], generate(name, 3000, 7)
    words = Counter(w for slots in task.classes.values() for w in {*sum(slots.values(), ())})
    assert set(words.values()) == {1}
    assert (task.input_prefix[-2:], task.label_prefix[-1]) == (": ", ":")
    assert len({text for text, _ in rows}) == len(rows)
    gold = np.array([label for _, label in rows])
    classes = len(task.labels)
    assert np.abs(np.bincount(gold, minlength=classes) * classes / len(rows) - 1).max() < 0.12
    present = CountVectorizer(binary=True).fit_transform(text for text, _ in rows).toarray()

    def majority(chosen: np.ndarray) -> int:
        return int(np.bincount(gold[chosen], minlength=classes).max()) if chosen.any() else 0

    best = max(majority(column == 1) + majority(column == 0) for column in present.T) / len(rows)
    assert best < 1 / classes + 0.12
    together = BernoulliNB().fit(present[:2000], gold[:2000])
    assert 0.85 < together.score(present[2000:], gold[2000:]) < 0.999
