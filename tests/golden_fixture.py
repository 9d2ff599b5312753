"""Hashes of everything that the protocol draws, over generated rows: no real text is needed.

``python tests/golden_fixture.py > tests/golden_hashes.json`` writes them anew, which nobody should
need: the splits and samplers among them are StaICC's own, and the protocol does not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from typing import Any

from golden_support import Characters, sha256
from paper_sets import SETS

from abft_mlx import data, recipe
from abft_mlx.evaluation import methods, protocols
from abft_mlx.prompts import Prompt
from abft_mlx.task import Task, open_task

ROWS = {
    "sst2": 67349,
    "rotten_tomatoes": 8530,
    "financial_phrasebank": 2264,
    "sst5": 8544,
    "trec": 5952,
    "subjective": 8000,
    "tweet_eval_emotion": 5052,
    "tweet_eval_hate": 9000,
}
POOLS = (512, 3192, 4096)


def generated(rows: int, names: tuple[str, ...]) -> data.LabelledTexts:
    """Made-up texts of three to seven words, and labels in no simple order."""
    texts = tuple(
        " ".join(f"w{(31 * i + 17 * j) % 97}" for j in range(3 + i % 5)) + f" n{i}"
        for i in range(rows)
    )
    labels = tuple((i * i + i // 7) % len(names) for i in range(rows))
    return data.LabelledTexts(texts, labels, names, "generated")


@cache
def made_task(name: str = "trec") -> tuple[Task, Any]:
    """A shipped recipe's task over generated rows, and the recipe's evaluation section."""
    one = recipe.load(name)
    section = recipe.task(one)
    texts = generated(ROWS[name], tuple(section.data.labels or ()))
    prefixes = sorted({template.label_prefix for template in protocols.templates(section)})
    return open_task(section, texts, Characters(prefixes, texts.names)), one.evaluation


def written(made: list[Prompt]) -> str:
    """The hash of prompts as StaICC writes them, with a space at their end."""
    task, _ = made_task()
    return sha256([task.tokenizer.decode(prompt.token_ids) + " " for prompt in made])


def generator() -> dict[str, Any]:
    numbers = data.Generator()
    return {
        "first": [round(numbers.random() * 2**32) for _ in range(4)],
        "integers": [numbers.integers(3, 50) for _ in range(8)],
        "permutation of 1000": sha256(data.Generator().draw(1000, 1000)),
        "1000 of 100, repeating": sha256(data.Generator().draw(100, 1000, repetition=True)),
    }


def splits() -> dict[str, Any]:
    found = {}
    for name in SETS:
        section = recipe.load(name).data
        rows = data.split(generated(ROWS[name], ("a", "b")), section).rows
        found[name] = {part: sha256(list(one)) for part, one in rows.items()}
    return found


def samplers() -> dict[str, Any]:
    found = {
        str(pool): sha256([list(row) for row in data.demonstration_rows(512, 2, pool, 4)])
        for pool in POOLS
    }
    training = sha256([list(row) for row in data.training_rows(512, 1024, 4)])
    return {**found, "training of 1024": training}


def resampled() -> dict[str, Any]:
    found = {}
    for pool, classes in zip(POOLS, (2, 4, 6), strict=True):
        numbers = data.Generator(7)
        labels = [numbers.integers(0, classes) for _ in range(pool)]
        gold = [numbers.integers(0, classes) for _ in range(512)]
        rows = [list(row) for row in protocols.unseen_rows(labels, gold, 2, 4)]
        found[f"{classes} labels on {pool} rows"] = {"first": rows[:2], "sha256": sha256(rows)}
    return found


def templates() -> dict[str, Any]:
    return {
        name: sha256([astuple(one) for one in protocols.templates(recipe.task(recipe.load(name)))])
        for name in SETS
    }


def asked_prompts() -> dict[str, Any]:
    task, section = made_task()
    return {
        "normal": written(task.test_prompts(section)),
        "template": [written(made) for _, made in protocols.variant_prompts(task, section)],
        "demonstrations": written(protocols.redrawn_prompts(task, section)),
        "unseen": written(protocols.unseen_prompts(task, section)),
    }


def bias_prompts() -> dict[str, Any]:
    task, section = made_task()
    contextual, domain = protocols.prior_prompts(task, section)
    return {
        "contextual": written(contextual),
        "domain": written(domain),
        "wrong labels": [written(made) for made in protocols.wrong_label_prompts(task, section)],
    }


def calibration_prompts() -> dict[str, Any]:
    task, _ = made_task()
    return {
        "contextual": written(methods.contextual_prompts(task, 64)),
        "domain": written(methods.domain_prompts(task, 64)),
        "anchors": written(methods.anchor_prompts(task, 64)),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "generator": generator,
    "splits": splits,
    "samplers": samplers,
    "unseen rows": resampled,
    "templates": templates,
    "test prompts": asked_prompts,
    "bias prompts": bias_prompts,
    "calibration prompts": calibration_prompts,
}

if __name__ == "__main__":
    print(json.dumps({name: part() for name, part in PARTS.items()}, indent=1))
