"""Bias and the effect of wrong labels: by hand, against SciPy, and a model asked one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import small_task
from heard import Heard
from scipy import stats
from small_task import HandGenerator

from abft_mlx.errors import PromptError
from abft_mlx.evaluation import bias as module
from abft_mlx.evaluation.bias import (
    bias,
    correctness,
    entropy,
    posterior_kl,
    prior_prompts,
    slope,
    wrong_label_prompts,
    wrong_labels,
)
from abft_mlx.evaluation.methods import domain_queries


def test_entropy_by_hand_and_by_scipy() -> None:
    assert entropy(np.array([0.5, 0.5])) == pytest.approx(math.log(2))
    assert entropy(np.array([0.0, 1.0, 0.0])) == 0
    mean = np.random.default_rng(1).dirichlet([1] * 6)
    assert entropy(mean) == pytest.approx(stats.entropy(mean))


def test_compat_softmaxes_a_mean_again_unless_it_sums_to_exactly_one() -> None:
    """The protocol's example: the entropy of (.9, .1) jumps from .325 to .619."""
    off = np.array([0.9, 0.1 + 2**-50])
    assert off.sum() != 1.0
    assert entropy(off) == pytest.approx(0.325, abs=5e-4)
    assert entropy(off, compat=True) == pytest.approx(0.619, abs=5e-4)
    exact = np.array([0.75, 0.25])
    assert entropy(exact, compat=True) == entropy(exact) == pytest.approx(stats.entropy(exact))


def test_posterior_kl_equals_scipys() -> None:
    rng = np.random.default_rng(2)
    probabilities, gold = rng.dirichlet([1] * 3, size=50), rng.integers(0, 3, 50)
    frequency = np.bincount(gold, minlength=3) / 50
    wanted = stats.entropy(probabilities.mean(axis=0), frequency)
    assert posterior_kl(probabilities, gold) == pytest.approx(wanted)
    assert wanted > 0.001


def test_posterior_kl_without_smoothing() -> None:
    """A label that is gold nowhere: infinite where it has probability, else left out."""
    gold = np.array([0, 0, 1, 1])
    assert posterior_kl(np.full((4, 3), 1 / 3), gold) is None
    never = np.tile([0.75, 0.25, 0.0], (4, 1))
    wanted = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert posterior_kl(never, gold) == pytest.approx(wanted)


def test_slope_is_the_least_squares_line() -> None:
    x, y = [1, 0.75, 0.5, 0.25, 0], [0.9, 0.75, 0.7, 0.3, 0.2]
    assert slope(x, y) == pytest.approx(stats.linregress(x, y).slope)
    assert slope([0, 1], [0.2, 0.7]) == pytest.approx(0.5)


def test_correctness_counts_the_labels_that_are_right() -> None:
    assert correctness(4) == [1, 0.75, 0.5, 0.25, 0]
    assert correctness(3) == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
    assert correctness(1) == [1, 1, 1, 1, 0]


def test_domain_queries_by_hand() -> None:
    texts = ["a b c", "d e", "f  g", "never"]
    hand = HandGenerator()
    wanted = []
    for _ in range(3):
        words = []
        for _ in range(7):
            pieces = texts[hand.below(3)].split(" ")
            words.append(pieces[hand.below(len(pieces) - 1)])
        wanted.append(" ".join(words))
    assert domain_queries(texts, 3, 7) == wanted
    many = " ".join(domain_queries(texts, 20, 50)).split(" ")
    assert set(many) == {"a", "b", "d", "f", ""}  # two spaces have an empty word between them
    assert domain_queries(texts, 3, 7, seed=43) != wanted


def test_domain_queries_of_one_word_or_one_text() -> None:
    assert domain_queries(["word"], 2, 3) == ["word word word"] * 2


def test_wrong_labels_by_hand() -> None:
    """k = 4, five rates, one generator on and on; the last class is followed by the first."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 30).tolist()
    rows = [tuple(rng.choice(30, 4, replace=False).tolist()) for _ in range(25)]
    hand, wanted = HandGenerator(), []
    for wrong in range(5):
        shown = []
        for row in rows:
            chosen = hand.draw(list(row), wrong)
            shown.append(tuple((labels[i] + 1) % 3 if i in chosen else labels[i] for i in row))
        wanted.append(shown)
    assert wrong_labels(rows, labels, 3) == wanted
    assert wrong_labels(rows, labels, 3, seed=43) != wanted


def test_wrong_labels_round_down_and_take_a_repeated_row_whole() -> None:
    three = wrong_labels([(0, 1, 2)] * 50, [0, 1, 1], 2)
    changed = [
        [sum(a != b for a, b in zip(row, (0, 1, 1), strict=True)) for row in r] for r in three
    ]
    assert [set(one) for one in changed] == [{0}, {0}, {1}, {2}, {3}]
    twice = wrong_labels([(0, 0, 1, 2)] * 50, [0, 1, 1], 2)[1]
    assert {row[:2] for row in twice} == {(0, 0), (1, 1)}


def by_hand(task: Any, model: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Probabilities of the contextual and domain prompts, and of the five rates, one by one."""
    pool, test = task.splits.demonstrations.pairs(), task.splits.test.pairs()
    sampler, words, wrong = HandGenerator(), HandGenerator(), HandGenerator()
    rows = [sampler.draw(range(20), 2) for _ in range(24)]

    def ask(shown: list[tuple[str, int]], query: str) -> np.ndarray:
        return small_task.asked(model, small_task.written(task.template, shown, query))

    def nonsense() -> str:
        chosen = []
        for _ in range(128):
            pieces = pool[words.below(19)][0].split(" ")
            chosen.append(pieces[words.below(len(pieces) - 1)])
        return " ".join(chosen)

    shown = [[pool[i] for i in row] for row in rows]
    priors = [
        np.array([ask(one, "") for one in shown]),
        np.array([ask(one, nonsense()) for one in shown]),
    ]
    rates = []
    for count in (0, 0, 1, 1, 2):  # of two demonstrations
        found = []
        for i, row in enumerate(rows):
            flipped = wrong.draw(row, count)
            one = [(pool[j][0], (pool[j][1] + (j in flipped)) % 3) for j in row]
            found.append(ask(one, test[i % 12][0]))
        rates.append(np.array(found))
    return priors, rates


def test_bias_equals_a_model_asked_prompt_by_prompt() -> None:
    task, model = small_task.task(), small_task.model()
    (empty, words), rates = by_hand(task, model)
    gold = np.array([task.splits.test.labels[i % 12] for i in range(24)])
    accuracies = [float((found.argmax(axis=1) == gold).mean()) for found in rates]
    assert len(set(accuracies)) > 1
    heard = Heard()
    section = small_task.settings()
    found = bias(model, task, section, rates[0], gold, heard)
    assert found["contextual_entropy"] == pytest.approx(stats.entropy(empty.mean(axis=0)), abs=1e-5)
    assert found["domain_entropy"] == pytest.approx(stats.entropy(words.mean(axis=0)), abs=1e-5)
    assert abs(found["contextual_entropy"] - found["domain_entropy"]) > 1e-3
    assert found["maximum_entropy"] == pytest.approx(math.log(3))
    frequency = np.bincount(gold, minlength=3) / 24
    assert found["posterior_kl"] == pytest.approx(
        stats.entropy(rates[0].mean(axis=0), frequency), abs=1e-6
    )
    assert list(found["gler_accuracy"]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert list(found["gler_accuracy"].values()) == pytest.approx(accuracies)
    right = [1, 1, 0.5, 0.5, 0]
    assert found["gler"] == pytest.approx(stats.linregress(right, accuracies).slope)
    assert heard.counts[-1] == (6 * 24, 6 * 24)

    compat = bias(model, task, section.model_copy(update={"compat": True}), rates[0], gold)
    mistaken = [1, 0.75, 0.25, -0.5, -1.5]
    assert compat["gler"] == pytest.approx(stats.linregress(mistaken, accuracies).slope)
    assert abs(compat["gler"] - found["gler"]) > 1e-3
    for key in ("posterior_kl", "gler_accuracy", "maximum_entropy"):
        assert compat[key] == found[key]


def test_both_entropies_follow_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.array([0.9, 0.1 + 2**-40, 0.0])  # no rounding of the mean makes these sum to 1

    def same(_: Any, prompts: list[Any], *__: Any, **___: Any) -> np.ndarray:
        return np.tile(row, (len(prompts), 1))

    monkeypatch.setattr(module, "label_probabilities", same)
    task, gold = small_task.task(), np.array(small_task.task().splits.test.labels * 2)
    for compat, wanted in ((False, row), (True, np.exp(row) / np.exp(row).sum())):
        found = bias(None, task, small_task.settings(compat=compat), np.tile(row, (24, 1)), gold)
        for key in ("contextual_entropy", "domain_entropy"):
            assert found[key] == pytest.approx(stats.entropy(wanted), abs=1e-9)


def test_words_and_demonstrations_follow_the_seed() -> None:
    task, pool = small_task.task(), small_task.task().splits.demonstrations
    for seed in (42, 43):
        _, domain = prior_prompts(task, small_task.settings(seed=seed))
        shown = [pool.pairs()[i] for i in HandGenerator(seed).draw(range(20), 2)]
        query = domain_queries(pool.texts, 1, 128, seed)[0]
        wanted = small_task.written(task.template, shown, query)
        assert task.tokenizer.decode(domain[0].token_ids) == wanted


def test_a_model_that_copies_follows_wrong_labels_all_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One demonstration, two labels: the copied answer is right if and only if it was wrong."""
    copy = small_task.always(lambda prompt: prompt.demonstration_labels[0])
    monkeypatch.setattr(module, "label_probabilities", copy)
    names = ("positive", "negative")
    task = small_task.task(whole=small_task.texts(60, names), prompt={"demonstrations": 1})
    section = small_task.settings()
    prompts = task.test_prompts(section)
    gold = np.array([prompt.gold for prompt in prompts])
    vanilla = copy(None, prompts, task.space, batch_tokens=1)
    found = bias(None, task, section, vanilla, gold)
    share = float((vanilla.argmax(axis=1) == gold).mean())
    wanted = [share, share, share, share, 1 - share]
    assert list(found["gler_accuracy"].values()) == pytest.approx(wanted)
    assert found["gler"] == pytest.approx(2 * share - 1)


def test_prompts_at_rate_zero_are_the_test_prompts_and_gold_labels_stay() -> None:
    task, section = small_task.task(), small_task.settings()
    made = wrong_label_prompts(task, section)
    plain = task.test_prompts(section)
    assert made[0] == list(plain)
    assert made[4] != plain
    for rate in made:
        assert [prompt.gold for prompt in rate] == [prompt.gold for prompt in plain]


def test_a_domain_query_beyond_the_context_says_what_to_do() -> None:
    task = small_task.task()
    short = type(task)(**{**vars(task), "context_tokens": 90})
    with pytest.raises(
        PromptError, match=r"domain-bias prompt 0 is \d+ tokens long.*context is 90"
    ):
        prior_prompts(short, small_task.settings())
