"""Consistency over templates and demonstrations: by hand, and against a model asked one by one."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import small_task
from heard import Heard
from small_task import HandGenerator

from abft_mlx import recipe
from abft_mlx.errors import PromptError, RecipeError
from abft_mlx.evaluation import robustness as module
from abft_mlx.evaluation.metrics import bootstrap_interval
from abft_mlx.evaluation.robustness import (
    FACTORS,
    L9,
    modal_shares,
    robustness,
    templates,
    variant_prompts,
)
from abft_mlx.prompts import Template

VARIANTS = {
    "instruction": ("Sort the texts. ", "What is it? "),
    "input_prefix": ("film: ", "meal: "),
    "label_prefix": ("word:", "is:"),
    "label_affix": (" ", "\t"),
}


def test_modal_shares_by_hand() -> None:
    """Query 0: labels 0, 0, 2, 0; query 1: 1, 2, 0, 3; query 2: 1, 2, 2, 1."""
    predicted = np.array([[0, 1, 1], [0, 2, 2], [2, 0, 2], [0, 3, 1]])
    assert modal_shares(predicted).tolist() == [0.75, 0.25, 0.5]


def test_templates_combine_every_two_levels_of_two_pieces_once() -> None:
    assert L9[0] == (0, 0, 0, 0)
    for one, other in combinations(range(4), 2):
        assert sorted((row[one], row[other]) for row in L9) == sorted(product(range(3), repeat=2))


def test_templates_are_the_prompts_own_words_and_the_variants() -> None:
    task = small_task.task(
        prompt={"instruction": "Read. ", "query_prefix": "? ", "input_affix": " - "},
        variants=VARIANTS,
    )
    made = templates(task.section)
    assert made[0] == task.template
    assert made[5] == Template(  # row 1201
        instruction="Sort the texts. ",
        input_prefix="meal: ",
        input_affix=" - ",
        label_prefix="label:",
        label_affix=" ",
        query_prefix="? ",
    )
    levels: dict[str, Counter[str]] = {f: Counter(getattr(one, f) for one in made) for f in FACTORS}
    for factor, counts in levels.items():
        own = getattr(task.template, factor)
        assert counts == dict.fromkeys((own, *VARIANTS[factor]), 3)


def by_hand(task: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (9, 12) over templates and (8, 12) over sets, prompt by prompt."""
    pool, test = task.splits.demonstrations.pairs(), task.splits.test.pairs()
    sampler = HandGenerator()
    rows = [sampler.draw(range(20), 2) for _ in range(8 * 12)]

    def label(template: Template, row: list[int], query: int) -> int:
        text = small_task.written(template, [pool[i] for i in row], test[query][0])
        return int(np.argmax(small_task.asked(model, text)))

    over_templates = [
        [label(template, rows[q], q) for q in range(12)] for template in templates(task.section)
    ]
    over_sets = [[label(task.template, rows[q + 12 * r], q) for q in range(12)] for r in range(8)]
    return np.array(over_templates), np.array(over_sets)


def test_both_parts_equal_a_model_asked_prompt_by_prompt() -> None:
    task, model = small_task.task(variants=VARIANTS), small_task.model()
    heard = Heard()
    found = robustness(model, task, small_task.settings(), heard)
    gold = np.array(task.splits.test.labels)
    for part, predicted in zip(("template", "demonstrations"), by_hand(task, model), strict=True):
        shares = [Counter(column).most_common(1)[0][1] / len(predicted) for column in predicted.T]
        assert 1 / 3 < np.mean(shares) < 1  # the model changes its mind, so this says something
        assert found[part]["consistency"] == pytest.approx(np.mean(shares))
        assert found[part]["accuracy"] == pytest.approx((predicted == gold).mean(axis=1).tolist())
        assert found[part]["queries"] == 12
        interval = bootstrap_interval(np.array(shares), np.arange(12), 50, 42)
        assert found[part]["interval"] == pytest.approx(interval)
        assert set(found[part]) == {"consistency", "accuracy", "queries", "interval"}
    assert set(found) == {"template", "demonstrations"}
    assert heard.counts[-1] == (9 * 12 + 8 * 12, 9 * 12 + 8 * 12)
    assert [done for done, _ in heard.counts] == sorted(done for done, _ in heard.counts)


def test_a_model_that_never_changes_its_mind_is_fully_consistent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "label_probabilities", small_task.always(lambda _: 1))
    found = robustness(None, small_task.task(), small_task.settings())
    share = small_task.task().splits.test.labels.count(1) / 12
    for part in found.values():
        assert part["consistency"] == 1
        assert part["interval"] == [1, 1]
        assert part["accuracy"] == pytest.approx([share] * len(part["accuracy"]))


def test_a_model_that_copies_depends_on_its_demonstrations_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = small_task.always(lambda prompt: prompt.demonstration_labels[-1])
    monkeypatch.setattr(module, "label_probabilities", copy)
    found = robustness(None, small_task.task(), small_task.settings(bootstrap_samples=0))
    assert found["template"]["consistency"] == 1
    assert found["demonstrations"]["consistency"] < 1
    assert "interval" not in found["template"] | found["demonstrations"]


def test_the_protocols_numbers_of_queries_unless_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "label_probabilities", small_task.always(lambda _: 0))
    large = small_task.task(400, data={"test_rows": 150})
    heard, counts = Heard(), {}
    for queries in (512, 110, 30):
        section = small_task.settings(queries=queries, repeats=1)
        found = robustness(None, large, section, heard)
        counts[queries] = [found[part]["queries"] for part in ("template", "demonstrations")]
        for part in found.values():
            share = large.splits.test.labels[: part["queries"]].count(0) / part["queries"]
            assert part["accuracy"] == pytest.approx([share] * len(part["accuracy"]))
    assert counts == {512: [100, 128], 110: [100, 110], 30: [30, 30]}
    assert (9 * 100 + 8 * 128, 9 * 100 + 8 * 128) in heard.counts


def test_seed_changes_the_demonstrations_of_both() -> None:
    task = small_task.task()
    one, other = (
        [made for _, made in variant_prompts(task, small_task.settings(seed=seed))]
        for seed in (42, 43)
    )
    again = [made for _, made in variant_prompts(task, small_task.settings())]
    assert one == again
    assert all(a != b for a, b in zip(one, other, strict=True))
    first, second = (
        module.redrawn_prompts(task, small_task.settings(seed=seed)) for seed in (42, 43)
    )
    assert first != second


def test_a_wording_that_makes_no_prompt_is_named() -> None:
    task = small_task.task(variants={"label_affix": ["bot ", "\t"]})
    told = (
        r"^template 1 of variants \(input_prefix 'sentence: ', label_prefix 'class:', "
        r"label_affix 'bot '\): .*merges"
    )
    with pytest.raises(PromptError, match=told):
        variant_prompts(task, small_task.settings())


def test_a_variant_label_prefix_leaves_its_space_to_the_label() -> None:
    with pytest.raises(RecipeError, match=r"variants.label_prefix.* ends in a space"):
        recipe.load("demo", ['variants.label_prefix=["label: ", "Label:"]'])
    with pytest.raises(RecipeError, match=r"variants.label_prefix.* ends in a space"):
        recipe.load("demo", ['variants.label_prefix=["label:", "Label: "]'])
