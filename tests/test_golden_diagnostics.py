"""Every golden value of StaICC, made again: splits, samplers, and all its prompts word for word.

Each section of the reference is compared whole, so a value that nobody checks cannot be in it. The
golden prompts have StaICC's default form; ours are those without the space at their end.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from golden_support import golden, sha256, staicc_task
from paper_sets import SETS

from abft_mlx import data, prompts
from abft_mlx.evaluation.protocols import (
    QUERIES,
    prior_prompts,
    redrawn_prompts,
    unseen_prompts,
    unseen_rows,
    variant_prompts,
)
from abft_mlx.evaluation.protocols import SETS as REPEATS
from abft_mlx.recipe import EvaluationSection
from abft_mlx.task import Task

# Sentences for people; what they say is what the other fields check.
PROSE = {"split_rule", "meaning", "note", "rule"}


def written(task: Task, made: list[prompts.Prompt], space: str = " ") -> list[str]:
    """Prompts as text; with StaICC's space at the end unless told otherwise."""
    return [task.tokenizer.decode(prompt.token_ids) + space for prompt in made]


def without_prose(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: without_prose(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in PROSE
    }


def splits(task: Task) -> dict[str, Any]:
    parts = {"calibration": "training", "demonstration": "demonstrations", "test": "test"}
    made: dict[str, Any] = {"split_sizes": {}}
    for key, part in parts.items():
        rows = list(task.splits.rows[part])
        counts = Counter(getattr(task.splits, part).labels)
        made["split_sizes"][key] = len(rows)
        made[key] = {
            "first10_row_indices": rows[:10],
            "sha256_of_compact_json_index_list": sha256(rows),
            "class_histogram": {str(label): counts[label] for label in sorted(counts)},
        }
    return made


def normal(task: Task, section: EvaluationSection) -> dict[str, Any]:
    rows = [list(row) for row in task.test_rows(section)]
    made = task.test_prompts(section)
    texts = written(task, made)
    pool, asked = task.splits.demonstrations, task.splits.test
    n, queries = len(asked), [data.fold(text) for text in asked.texts]
    known = [data.fold(text) for text in pool.texts]
    everything, trained = set(known), {data.fold(text) for text in task.splits.training.texts}
    hits = [prompt.gold in prompt.demonstration_labels for prompt in made]
    return {
        "demo_sampler_k4": {"first5": rows[:5], "rows": len(rows), "sha256": sha256(rows)},
        "normal_prompts_k4": {
            "count": len(texts),
            "sha256": sha256(texts),
            "first": texts[0],
            "label_of_first": made[0].gold,
            "chars_mean": round(sum(map(len, texts)) / len(texts), 1),
            "chars_max": max(map(len, texts)),
        },
        "fraction_of_test_prompts_with_gold_label_in_demos_k4": round(sum(hits) / len(hits), 4),
        "majority_class_accuracy_on_test": round(max(Counter(asked.labels).values()) / n, 4),
        "test_texts_also_in_demonstration": sum(text in everything for text in queries),
        "test_texts_also_in_calibration": sum(text in trained for text in queries),
        "test_prompts_whose_query_text_is_one_of_its_demos": sum(
            queries[i % n] in [known[row] for row in chosen] for i, chosen in enumerate(rows)
        ),
        "space_in_label_form": {
            "label_space": [f" {word}" for word in task.space.words],
            "first": written(task, made[:1], "")[0],
            "sha256": sha256(written(task, made, "")),
        },
    }


def diagnostics(task: Task, section: EvaluationSection) -> dict[str, Any]:
    worded = [written(task, made) for _, made in variant_prompts(task, section)]
    contextual, domain = (written(task, made) for made in prior_prompts(task, section))
    sampler = [list(row) for row in task.test_rows(section)]
    pool, gold = task.splits.demonstrations.labels, task.splits.test.labels
    rows = [list(row) for row in unseen_rows(pool, gold, section.repeats, task.demonstrations)]
    unseen = written(task, unseen_prompts(task, section))
    return {
        "template_sensitivity": {
            "queries": len(worded[0]),
            "sha256": sha256(worded),
            "query0": [one[0] for one in worded],
        },
        "demonstration_sensitivity": {
            "queries": QUERIES,
            "repeats": REPEATS,
            "sha256": sha256(written(task, redrawn_prompts(task, section))),
        },
        "contextual_bias": {
            "count": len(contextual),
            "first": contextual[0],
            "sha256": sha256(contextual),
        },
        "domain_bias": {"count": len(domain), "first": domain[0], "sha256": sha256(domain)},
        "unseen_label_mode": {
            "rows_resampled": sum(a != b for a, b in zip(sampler, rows, strict=True)),
            "first5": rows[:5],
            "sha256_sampler": sha256(rows),
            "sha256_prompts": sha256(unseen),
            "first_prompt": unseen[0],
        },
    }


@pytest.mark.parametrize("name", SETS)
def test_every_golden_value_is_made_again(name: str, shared: Path) -> None:
    one, task = staicc_task(name, shared)
    made = splits(task) | normal(task, one.evaluation) | diagnostics(task, one.evaluation)
    wanted = without_prose(golden(shared)[name])
    assert made.keys() == wanted.keys()
    for key, value in wanted.items():
        assert made[key] == value, key
