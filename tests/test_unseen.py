"""Demonstrations without the query's label: the rows by hand, the metrics one prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small_task
from heard import Heard
from hypothesis import given
from hypothesis import strategies as st
from small_task import HandGenerator

from abft_mlx.data import Generator, LabelledTexts, demonstration_rows
from abft_mlx.errors import DataError
from abft_mlx.evaluation import unseen as module
from abft_mlx.evaluation.metrics import intervals, summary
from abft_mlx.evaluation.unseen import LONGEST_SEARCH, unseen, unseen_prompts, unseen_rows


def rows_by_hand(labels: list[int], gold: list[int], repeats: int, k: int) -> list[tuple[int, ...]]:
    hand = HandGenerator()
    rows = [tuple(hand.draw(range(len(labels)), k)) for _ in range(repeats * len(gold))]
    washed = [i for i, row in enumerate(rows) if gold[i % len(gold)] in {labels[j] for j in row}]
    for i in washed:
        while gold[i % len(gold)] in {labels[j] for j in rows[i]}:
            rows[i] = tuple(hand.draw(range(len(labels)), k))
    return rows


@pytest.mark.parametrize(("classes", "pool"), [(2, 40), (3, 40), (6, 25)])
def test_rows_by_hand(classes: int, pool: int) -> None:
    rng = np.random.default_rng(classes)
    labels, gold = rng.integers(0, classes, pool).tolist(), rng.integers(0, classes, 30).tolist()
    found = unseen_rows(labels, gold, 2, 4)
    assert found == rows_by_hand(labels, gold, 2, 4)
    kept = [a == b for a, b in zip(found, demonstration_rows(30, 2, pool, 4), strict=True)]
    assert any(kept) or classes == 2
    assert not all(kept)
    assert unseen_rows(labels, gold, 2, 4, seed=43) != found


@given(
    st.lists(st.integers(0, 3), min_size=12, max_size=60),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_no_demonstration_has_the_querys_label(
    labels: list[int], gold: list[int], repeats: int, k: int
) -> None:
    scarce = [one for one in gold if len(labels) - labels.count(one) < k]
    if scarce:
        with pytest.raises(ValueError, match="rows are not of label"):
            unseen_rows(labels, gold, repeats, k)
        return
    rows = unseen_rows(labels, gold, repeats, k)
    assert len(rows) == len(gold) * repeats
    for i, row in enumerate(rows):
        assert len(set(row)) == k
        assert gold[i % len(gold)] not in {labels[j] for j in row}


def test_a_rare_label_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 of 3,000 rows without the label: redrawing would take 3 million million draws."""
    draws: list[int] = []

    class Counting(Generator):
        def draw(self, *asked: Any) -> list[int]:
            draws.append(1)
            assert len(draws) <= 4 + 3, "it goes on drawing"
            return super().draw(*asked)

    monkeypatch.setattr(module, "Generator", Counting)
    labels = [0] * 2996 + [1] * 4
    rows = unseen_rows(labels, [0, 1], 2, 4)
    assert [set(rows[i]) for i in (0, 2)] == [{2996, 2997, 2998, 2999}] * 2
    assert rows[1] == demonstration_rows(2, 1, 3000, 4)[1]
    assert LONGEST_SEARCH > 34  # what the paper's sets need is always searched for


def test_a_pool_smaller_than_k_is_drawn_with_repetition() -> None:
    rows = unseen_rows([0, 1, 2], [0, 1], 10, 4)
    assert all(len(row) == 4 for row in rows)
    assert {j for row in rows[::2] for j in row} == {1, 2}
    with pytest.raises(ValueError, match="0 of 3 rows are not of label 0"):
        unseen_rows([0, 0, 0], [0], 1, 4)


def unbalanced(common: int) -> LabelledTexts:
    """60 texts of which all but a few, spread out, have label 0."""
    whole = small_task.texts(60, ("positive", "negative"))
    labels = tuple(int(i % 60 >= common) for i in range(60))
    return LabelledTexts(whole.texts, labels, whole.names, whole.source)


def test_too_few_other_labels_is_one_clear_error() -> None:
    task = small_task.task(whole=unbalanced(56))
    others = task.splits.demonstrations.labels.count(1)
    assert others == 1
    with pytest.raises(DataError) as raised:
        unseen(None, task, small_task.settings())
    assert str(raised.value) == (
        f"made.csv: {others} of 20 demonstration rows have a label other than 'positive', and "
        "unseen-label prompts need 2 of them: add rows of other labels, lower "
        "prompt.demonstrations, or leave unseen out of evaluation.protocols"
    )


def test_just_enough_other_labels_are_enough() -> None:
    """Two demonstrations from the only two rows; or four from a pool of three, with repetition."""
    spread = small_task.task(whole=unbalanced(55))
    assert spread.splits.demonstrations.labels.count(1) == 2
    assert spread.splits.test.labels.count(0)
    for prompt in unseen_prompts(spread, small_task.settings()):
        assert prompt.gold not in prompt.demonstration_labels
    task = small_task.task(prompt={"demonstrations": 4})
    pool = task.splits.demonstrations
    rows = [pool.labels.index(label) for label in range(3)]
    splits = replace(task.splits, demonstrations=pool.subset(rows))
    for prompt in unseen_prompts(replace(task, splits=splits), small_task.settings()):
        assert len(prompt.demonstration_labels) == 4
        assert prompt.gold not in prompt.demonstration_labels


def by_hand(task: Any, model: Any) -> dict[str, np.ndarray]:
    pool, test = task.splits.demonstrations, task.splits.test.pairs()
    sampler = HandGenerator()
    chosen = {
        "random": [sampler.draw(range(20), 2) for _ in range(24)],
        "unseen": rows_by_hand(list(pool.labels), list(task.splits.test.labels), 2, 2),
        "zero_shot": [()] * 24,
    }

    def ask(row: Any, query: str) -> np.ndarray:
        shown = [pool.pairs()[i] for i in row]
        return small_task.asked(model, small_task.written(task.template, shown, query))

    return {
        name: np.array([ask(row, test[i % 12][0]) for i, row in enumerate(rows)])
        for name, rows in chosen.items()
    }


def test_metrics_equal_a_model_asked_prompt_by_prompt() -> None:
    task, model = small_task.task(), small_task.model()
    gold = np.array([task.splits.test.labels[i % 12] for i in range(24)])
    heard = Heard()
    found = unseen(model, task, small_task.settings(), heard)
    assert list(found) == ["random", "unseen", "zero_shot"]
    for name, probabilities in by_hand(task, model).items():
        wanted = summary(probabilities, gold)
        for key, value in wanted.pop("reliability").items():
            assert found[name]["reliability"][key] == pytest.approx(value, abs=1e-5)
        for key, value in wanted.items():
            np.testing.assert_allclose(found[name][key], value, atol=1e-5, err_msg=f"{name} {key}")
        right = probabilities.argmax(axis=1) == gold
        assert found[name]["right"] == "".join(str(int(one)) for one in right)
        ends = intervals(probabilities, gold, np.arange(24) % 12, 50, 42)
        assert found[name]["interval"]["accuracy"] == pytest.approx(ends["accuracy"], abs=1e-5)
        assert set(found[name]) == {*wanted, "reliability", "interval", "right"}
    assert len({found[name]["right"] for name in found}) == 3
    assert heard.counts[-1] == (24 + 24 + 12, 24 + 24 + 12)
    assert [done for done, _ in heard.counts] == sorted(done for done, _ in heard.counts)


def test_known_probabilities_are_used_and_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, model = small_task.task(), small_task.model()
    asked: list[int] = []
    measure = module.label_probabilities

    def counting(model: Any, prompts: Any, *rest: Any, **options: Any) -> np.ndarray:
        asked.append(len(prompts))
        return measure(model, prompts, *rest, **options)

    monkeypatch.setattr(module, "label_probabilities", counting)
    plain = unseen(model, task, small_task.settings())
    assert asked == [48, 12]
    asked.clear()
    known = np.eye(3)[[1] * 24]
    found = unseen(model, task, small_task.settings(), None, known)
    assert asked == [24, 12]
    gold = np.array([task.splits.test.labels[i % 12] for i in range(24)])
    assert found["random"]["accuracy"] == np.mean(gold == 1)
    for name in ("unseen", "zero_shot"):
        assert found[name]["right"] == plain[name]["right"]


def test_compat_and_intervals_follow_the_section() -> None:
    task, model = small_task.task(), small_task.model()
    plain = unseen(model, task, small_task.settings(bootstrap_samples=0))
    compat = unseen(model, task, small_task.settings(bootstrap_samples=0, compat=True))
    for name, entry in plain.items():
        assert "interval" not in entry
        assert compat[name]["accuracy"] == entry["accuracy"]
        assert compat[name]["true_label_probability"] != entry["true_label_probability"]


def test_a_model_that_copies_gets_no_unseen_label_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(prompt: Any) -> int:
        return prompt.demonstration_labels[0] if prompt.demonstration_labels else 0

    monkeypatch.setattr(module, "label_probabilities", small_task.always(first))
    task = small_task.task()
    found = unseen(None, task, small_task.settings())
    assert found["unseen"]["accuracy"] == 0
    assert set(found["unseen"]["right"]) == {"0"}
    assert found["random"]["accuracy"] > 0
    assert found["zero_shot"]["accuracy"] == task.splits.test.labels.count(0) / 12


def test_prompts_have_the_test_prompts_queries_and_true_labels() -> None:
    task, section = small_task.task(), small_task.settings(seed=43)
    pool = task.splits.demonstrations
    made = unseen_prompts(task, section)
    rows = unseen_rows(pool.labels, task.splits.test.labels, 2, 2, 43)
    assert [prompt.gold for prompt in made] == [one.gold for one in task.test_prompts(section)]
    for prompt, row in zip(made, rows, strict=True):
        assert prompt.demonstration_labels == tuple(pool.labels[i] for i in row)
        assert prompt.gold not in prompt.demonstration_labels
    fewer = small_task.settings(queries=5)
    assert len(unseen_prompts(task, fewer)) == 10
