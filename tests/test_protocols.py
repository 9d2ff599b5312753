"""Bias, robustness, unseen labels and transfer: by hand, and a model asked prompt by prompt."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_task
from heard import Heard
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from small_task import HandGenerator

from abft_mlx import data, experiment, facts, recipe
from abft_mlx.data import LabelledTexts
from abft_mlx.errors import DataError, PromptError, RecipeError
from abft_mlx.evaluation import label_probabilities, protocols
from abft_mlx.evaluation.metrics import bootstrap_interval, summary
from abft_mlx.evaluation.protocols import (
    FACTORS,
    L9,
    Measurement,
    bias,
    entropy,
    posterior_kl,
    robustness,
    templates,
    transfer,
    unseen,
    unseen_prompts,
    unseen_rows,
    variant_prompts,
    wrong_label_prompts,
    wrong_labels,
)
from abft_mlx.task import Task

VARIANTS = {
    "instruction": ("Sort the texts. ", "What is it? "),
    "input_prefix": ("film: ", "meal: "),
    "label_prefix": ("word:", "is:"),
    "label_affix": (" ", "\t"),
}


class Asked:
    """A task's model, asked one written prompt at a time."""

    def __init__(self, **changes: Any) -> None:
        self.task, self.model = small_task.task(**changes), small_task.model()
        self.pool = self.task.splits.demonstrations.pairs()
        self.test = self.task.splits.test.pairs()
        self.gold = np.array([self.test[i % 12][1] for i in range(24)])

    def ask(self, shown: Any, query: str, template: Any = None) -> np.ndarray:
        text = small_task.written(template or self.task.template, list(shown), query)
        return small_task.asked(self.model, text)

    def rows(self, rows: Any) -> np.ndarray:
        """Probabilities of the 24 test prompts, behind these rows of demonstrations."""
        return np.array(
            [
                self.ask([self.pool[j] for j in row], self.test[i % 12][0])
                for i, row in enumerate(rows)
            ]
        )


def sampled(n: int = 24) -> list[list[int]]:
    hand = HandGenerator()
    return [hand.draw(range(20), 2) for _ in range(n)]


def always(patch: pytest.MonkeyPatch, answer: Any) -> None:
    patch.setattr(protocols, "label_probabilities", small_task.always(answer))


def test_entropy_and_kl_equal_scipys() -> None:
    rng = np.random.default_rng(2)
    probabilities, gold = rng.dirichlet([1] * 3, size=50), rng.integers(0, 3, 50)
    mean, frequency = probabilities.mean(axis=0), np.bincount(gold, minlength=3) / 50
    assert entropy(mean) == pytest.approx(stats.entropy(mean))
    assert entropy(np.array([0.0, 1.0, 0.0])) == 0
    assert posterior_kl(probabilities, gold) == pytest.approx(stats.entropy(mean, frequency))
    # A label that is gold nowhere: infinite where it has probability, else left out.
    gold = np.array([0, 0, 1, 1])
    assert posterior_kl(np.full((4, 3), 1 / 3), gold) is None
    wanted = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert posterior_kl(np.tile([0.75, 0.25, 0.0], (4, 1)), gold) == pytest.approx(wanted)
    # The protocol's example of a second softmax: the entropy of (.9, .1) jumps from .325 to .619.
    off = np.array([0.9, 0.1 + 2**-50])
    assert entropy(off) == pytest.approx(0.325, abs=5e-4)
    assert entropy(off, compat=True) == pytest.approx(0.619, abs=5e-4)
    exact = np.array([0.75, 0.25])
    assert entropy(exact, compat=True) == entropy(exact)


def test_wrong_labels_by_hand() -> None:
    """k = 4, five rates, one generator on and on; the last class is followed by the first."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 30).tolist()
    rows = [tuple(rng.choice(30, 4, replace=False).tolist()) for _ in range(25)]
    hand, wanted = HandGenerator(), []
    for wrong in range(5):
        chosen = [hand.draw(list(row), wrong) for row in rows]
        wanted.append(
            [
                tuple((labels[i] + (i in some)) % 3 for i in row)
                for row, some in zip(rows, chosen, strict=True)
            ]
        )
    assert wrong_labels(rows, labels, 3) == wanted
    assert wrong_labels(rows, labels, 3, seed=43) != wanted
    # A row that stands in a prompt twice is wrong twice.
    twice = wrong_labels([(0, 0, 1, 2)] * 50, [0, 1, 1], 2)[1]
    assert {row[:2] for row in twice} == {(0, 0), (1, 1)}


def test_bias_equals_a_model_asked_prompt_by_prompt() -> None:
    hand = Asked()
    rows, words, wrong = sampled(), HandGenerator(), HandGenerator()
    shown = [[hand.pool[i] for i in row] for row in rows]

    def nonsense() -> str:
        chosen = []
        for _ in range(128):
            pieces = hand.pool[words.below(19)][0].split(" ")
            chosen.append(pieces[words.below(len(pieces) - 1)])
        return " ".join(chosen)

    empty = np.array([hand.ask(one, "") for one in shown])
    domain = np.array([hand.ask(one, nonsense()) for one in shown])
    rates = []
    for count in (0, 0, 1, 1, 2):  # of two demonstrations
        found = []
        for i, row in enumerate(rows):
            flipped = wrong.draw(row, count)
            one = [(hand.pool[j][0], (hand.pool[j][1] + (j in flipped)) % 3) for j in row]
            found.append(hand.ask(one, hand.test[i % 12][0]))
        rates.append(np.array(found))
    accuracies = [float((found.argmax(axis=1) == hand.gold).mean()) for found in rates]
    assert len(set(accuracies)) > 1
    heard, section = Heard(), small_task.settings()
    found = bias(Measurement(hand.model, section, heard), hand.task, rates[0], hand.gold)
    assert found["contextual_entropy"] == pytest.approx(stats.entropy(empty.mean(axis=0)), abs=1e-5)
    assert found["domain_entropy"] == pytest.approx(stats.entropy(domain.mean(axis=0)), abs=1e-5)
    assert abs(found["contextual_entropy"] - found["domain_entropy"]) > 1e-3
    assert found["maximum_entropy"] == pytest.approx(math.log(3))
    assert found["posterior_kl"] == posterior_kl(rates[0], hand.gold)
    assert list(found["gler_accuracy"]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert list(found["gler_accuracy"].values()) == pytest.approx(accuracies)
    slope = stats.linregress([1, 1, 0.5, 0.5, 0], accuracies).slope
    assert found["gler"] == pytest.approx(slope)
    assert heard.counts[-1] == (6 * 24, 6 * 24)
    section = section.model_copy(update={"compat": True})
    compat = bias(Measurement(hand.model, section, heard), hand.task, rates[0], hand.gold)
    slope = stats.linregress([1, 0.75, 0.25, -0.5, -1.5], accuracies).slope
    assert compat["gler"] == pytest.approx(slope)
    assert compat["gler_accuracy"] == found["gler_accuracy"]


def test_both_entropies_follow_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.array([0.9, 0.1 + 2**-40, 0.0])  # no rounding of the mean makes these sum to 1

    def same(_: Any, prompts: list[Any], *__: Any, **___: Any) -> np.ndarray:
        return np.tile(row, (len(prompts), 1))

    monkeypatch.setattr(protocols, "label_probabilities", same)
    task, gold = small_task.task(), np.array(small_task.task().splits.test.labels * 2)
    for compat, wanted in ((False, row), (True, np.exp(row) / np.exp(row).sum())):
        section = small_task.settings(compat=compat)
        found = bias(Measurement(None, section, Heard()), task, np.tile(row, (24, 1)), gold)
        for key in ("contextual_entropy", "domain_entropy"):
            assert found[key] == pytest.approx(stats.entropy(wanted), abs=1e-9)


def test_templates_are_the_prompts_own_words_and_the_variants_in_an_orthogonal_table() -> None:
    for one, other in combinations(range(4), 2):
        assert sorted((row[one], row[other]) for row in L9) == sorted(product(range(3), repeat=2))
    own = {"instruction": "Read. ", "query_prefix": "? ", "input_affix": " - "}
    task = small_task.task(prompt=own, variants=VARIANTS)
    made = templates(task.section)
    assert made[0] == task.template
    assert {(one.query_prefix, one.input_affix) for one in made} == {("? ", " - ")}
    for row, template in zip(L9, made, strict=True):
        for factor, level in zip(FACTORS, row, strict=True):
            levels = (getattr(task.template, factor), *VARIANTS[factor])
            assert getattr(template, factor) == levels[level]


def test_robustness_equals_a_model_asked_prompt_by_prompt() -> None:
    hand, heard = Asked(variants=VARIANTS), Heard()
    rows = sampled(8 * 12)

    def label(template: Any, row: list[int], query: int) -> int:
        shown = [hand.pool[i] for i in row]
        return int(np.argmax(hand.ask(shown, hand.test[query][0], template)))

    over_templates = [
        [label(template, rows[q], q) for q in range(12)]
        for template in templates(hand.task.section)
    ]
    over_sets = [[label(None, rows[q + 12 * r], q) for q in range(12)] for r in range(8)]
    found = robustness(Measurement(hand.model, small_task.settings(), heard), hand.task)
    for part, predicted in (("template", over_templates), ("demonstrations", over_sets)):
        table = np.array(predicted)
        shares = [Counter(column).most_common(1)[0][1] / len(table) for column in table.T]
        assert 1 / 3 < np.mean(shares) < 1  # the model changes its mind, so this says something
        assert found[part] == {
            "consistency": pytest.approx(np.mean(shares)),
            "accuracy": pytest.approx((table == hand.gold[:12]).mean(axis=1).tolist()),
            "queries": 12,
            "interval": pytest.approx(bootstrap_interval(np.array(shares), np.arange(12), 50, 42)),
        }
    assert heard.counts[-1] == (17 * 12, 17 * 12)


def test_the_protocols_numbers_of_queries_unless_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, lambda prompt: prompt.demonstration_labels[-1])
    large, counts = small_task.task(400, data={"test_rows": 150}), {}
    for queries in (512, 110, 30):
        section = small_task.settings(queries=queries, repeats=1, bootstrap_samples=0)
        found = robustness(Measurement(None, section, Heard()), large)
        counts[queries] = [found[part]["queries"] for part in ("template", "demonstrations")]
        # A model that copies depends on its demonstrations alone.
        assert found["template"]["consistency"] == 1 > found["demonstrations"]["consistency"]
        assert "interval" not in found["template"]
    assert counts == {512: [100, 128], 110: [100, 110], 30: [30, 30]}


def test_a_wording_that_makes_no_prompt_is_named() -> None:
    task = small_task.task(variants={"label_affix": ["bot ", "\t"]})
    with pytest.raises(PromptError, match=r"template 1 .*label_affix 'bot '\): .*merges"):
        variant_prompts(task, small_task.settings())
    with pytest.raises(RecipeError, match=r"variants.label_prefix.* ends in a space"):
        recipe.load("demo", ['variants.label_prefix=["label: ", "Label:"]'])


def unseen_by_hand(labels: list[int], gold: list[int], repeats: int, k: int) -> list[Any]:
    hand = HandGenerator()
    rows = [tuple(hand.draw(range(len(labels)), k)) for _ in range(repeats * len(gold))]
    for i, row in enumerate(rows):
        while gold[i % len(gold)] in {labels[j] for j in row}:
            row = rows[i] = tuple(hand.draw(range(len(labels)), k))
    return rows


@given(
    st.lists(st.integers(0, 3), min_size=24, max_size=60),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.integers(1, 3),
)
def test_unseen_rows_by_hand(labels: list[int], gold: list[int], repeats: int) -> None:
    if min(len(labels) - labels.count(one) for one in gold) < 10:
        return
    assert unseen_rows(labels, gold, repeats, 3) == unseen_by_hand(labels, gold, repeats, 3)


def test_a_rare_label_is_found_at_once_and_a_small_pool_repeats() -> None:
    """4 of 3,000 rows without the label: redrawing would take 3 million million draws."""
    labels = [0] * 2996 + [1] * 4
    rows = unseen_rows(labels, [0, 1], 2, 4)
    assert [set(rows[i]) for i in (0, 2)] == [{2996, 2997, 2998, 2999}] * 2
    assert rows[1] == data.demonstration_rows(2, 1, 3000, 4)[1]
    assert protocols.LONGEST_SEARCH > 34  # what the paper's sets need is always searched for
    rows = unseen_rows([0, 1, 2], [0, 1], 10, 4)
    assert {j for row in rows[::2] for j in row} == {1, 2}


@pytest.mark.parametrize(("common", "others"), [(56, 1), (55, 2)])
def test_too_few_other_labels_are_one_clear_error(common: int, others: int) -> None:
    whole = small_task.texts(60, ("positive", "negative"))
    labels = tuple(int(i % 60 >= common) for i in range(60))
    task = small_task.task(whole=LabelledTexts(whole.texts, labels, whole.names, "made.csv"))
    assert task.splits.demonstrations.labels.count(1) == others
    if others == 2:  # just enough
        for prompt in unseen_prompts(task, small_task.settings()):
            assert prompt.gold not in prompt.demonstration_labels
        return
    with pytest.raises(DataError, match=r"1 of 20 demonstration rows .* need 2 of them"):
        unseen_prompts(task, small_task.settings())


def test_unseen_equals_a_model_asked_prompt_by_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    hand, heard = Asked(), Heard()
    labels = hand.task.splits.demonstrations.labels
    wanted = {
        "random": hand.rows(sampled()),
        "unseen": hand.rows(unseen_by_hand(list(labels), hand.gold[:12].tolist(), 2, 2)),
        "zero_shot": hand.rows([()] * 24),
    }
    found = unseen(Measurement(hand.model, small_task.settings(), heard), hand.task)
    assert list(found) == list(wanted)
    for name, probabilities in wanted.items():
        for key, value in summary(probabilities, hand.gold).items():
            if key != "reliability":
                np.testing.assert_allclose(found[name][key], value, atol=1e-5, err_msg=key)
        assert found[name].keys() >= {"interval", "right", "reliability"}
    assert heard.counts[-1] == (24 + 24 + 12, 24 + 24 + 12)
    # Probabilities that were computed already are used.
    known, heard = np.eye(3)[[1] * 24], Heard()
    again = unseen(Measurement(hand.model, small_task.settings(), heard), hand.task, known)
    assert again["random"]["accuracy"] == np.mean(hand.gold == 1)
    assert again["unseen"]["right"] == found["unseen"]["right"]
    assert heard.counts[-1] == (36, 36)
    # A model that copies gets no unseen label right.
    always(monkeypatch, lambda prompt: (*prompt.demonstration_labels, 0)[0])
    found = unseen(Measurement(None, small_task.settings(), Heard()), hand.task)
    assert found["unseen"]["accuracy"] == 0 < found["random"]["accuracy"]


def test_fixed_demonstrations_stay_fixed_when_wrong_or_unseen() -> None:
    task, section = small_task.task(), small_task.settings(demonstrations="fixed")
    plain = list(task.test_prompts(section))
    made = wrong_label_prompts(task, section)
    assert made[0] == plain
    for prompts in made:
        shown = [one.demonstration_labels for one in prompts]
        assert len(set(shown[:12])) == len(set(shown[12:])) == 1
    assert [one.gold for one in made[4]] == [one.gold for one in plain]
    prompts = unseen_prompts(task, section)
    sets: dict[tuple[int, int], set] = {}
    for place, one in enumerate(prompts):
        shown = one.token_ids[: one.label_positions[-1] + 1]
        sets.setdefault((place // 12, one.gold), set()).add(shown)
    assert {len(one) for one in sets.values()} == {1}


def other_task() -> Task:
    whole = small_task.texts(60)
    texts = tuple(f"{text} {n}" for n, text in enumerate(whole.texts))
    return small_task.task(whole=LabelledTexts(texts, whole.labels, whole.names, "other.csv"))


def test_transfer_leaves_out_queries_that_training_has_seen() -> None:
    first, second, model = small_task.task(), other_task(), small_task.model()
    section = small_task.settings()

    def measured(task: Task) -> dict[str, Any]:
        found = transfer(Measurement(model, section, Heard()), [task], [first])
        entry = found["tasks"]["small"]
        assert found["accuracy"] == entry.get("accuracy")
        return entry

    def expected(task: Task, kept: list[int]) -> str:
        prompts = [task.test_prompts(section)[i] for i in kept]
        found = label_probabilities(model, prompts, task.space, batch_tokens=512)
        right = found.argmax(1) == np.array([one.gold for one in prompts])
        return "".join(str(int(one)) for one in right)

    entry = measured(second)
    assert (entry["prompts"], entry["shared_queries"], entry["shared_demonstrations"]) == (24, 0, 0)
    assert entry["right"] == expected(second, list(range(24)))
    test, shown = second.splits.test, second.splits.demonstrations
    texts, others = list(test.texts), list(shown.texts)
    stolen = (*first.splits.training.texts, *first.splits.validation.texts)
    texts[2], others[5] = stolen[0].upper() + " !", stolen[-1]
    splits = replace(
        second.splits,
        test=replace(test, texts=tuple(texts)),
        demonstrations=replace(shown, texts=tuple(others)),
    )
    mixed = replace(second, splits=splits)
    entry, kept = measured(mixed), [i for i in range(24) if i % 12 != 2]
    assert (entry["prompts"], entry["shared_queries"]) == (22, 1)
    rows = data.demonstration_rows(12, 2, 20, 2, 42)
    assert entry["shared_demonstrations"] == sum(5 in rows[i] for i in kept) > 0
    assert entry["right"] == expected(mixed, kept)
    gone = replace(splits, test=replace(test, texts=(stolen[0],) * 12))
    assert measured(replace(second, splits=gone)) == {
        "prompts": 0, "shared_queries": 12, "shared_demonstrations": 0,
    }  # fmt: skip


def test_transfer_wants_other_tasks() -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.transfer is empty"):
        experiment.prepare(recipe.load("demo", ["evaluation.protocols=[transfer]"]))


def test_a_mixture_trains_on_its_tasks_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(
        "data: [demo, {data: {source: urgency}, prompt: {input_prefix: 'mail: '}}]\n"
        "training: {examples: 5, updates: 1, prompts_per_update: 4}\n"
    )
    opened = experiment.prepare(recipe.load(path))
    first, second = opened.mixture
    prompts = opened.training_prompts()
    texts = [opened.loaded.tokenizer.decode(list(one.token_ids)) for one in prompts]
    starts = [text.partition(":")[0] for text in texts]
    assert starts == ["message", "mail", "message", "mail", "message"]
    assert prompts[1] == second.training_prompts(opened.recipe.training)[0]
    assert opened.task.space.names == first.space.names
    # A checkpoint belongs to all texts of a mixture, in their order.
    made = {
        facts.digest(facts.made_with(opened.recipe, opened.loaded, some))
        for some in ([first], [second], [first, second], [second, first])
    }
    assert len(made) == 4
    path.write_text("data: [demo, {data: {source: urgency}, prompt: {demonstrations: 2}}]\n")
    with pytest.raises(RecipeError, match="urgency has 2 demonstrations, the recipe 4"):
        experiment.prepare(recipe.load(path))
