"""Classification tasks that write themselves: English-like texts from word lists of our own.

A text's class shows in several of its words together, never in one marker: every class-bearing
slot of a sentence draws a word of the text's own class with the family's ``signal`` probability,
and of another class otherwise. Pure Python, the same texts everywhere for the same seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from abft_mlx.data.generated import _held_out, _training
from abft_mlx.data.generated._family import Family

__all__ = ["DEMO_TASK", "TASKS", "GeneratedTask", "generate"]

DEMO_TASK = "intent"
"""The task of ``abft-mlx demo``; held out from the bundled base."""


@dataclass(frozen=True)
class GeneratedTask:
    """A task as users meet it.

    Attributes:
        name: what ``data.source`` calls it.
        labels: label words, in class order.
        input_prefix: what stands before a text, with its trailing space.
        label_prefix: what stands before a label, without a trailing space.
        held_out: True if the bundled base never saw these labels in a prompt.
        summary: what the label says about a text.
    """

    name: str
    labels: tuple[str, ...]
    input_prefix: str
    label_prefix: str
    held_out: bool
    summary: str


def _task(family: Family, held_out: bool) -> GeneratedTask:
    return GeneratedTask(
        name=family.name,
        labels=tuple(family.classes),
        input_prefix=family.input_prefix,
        label_prefix=family.label_prefix,
        held_out=held_out,
        summary=family.summary,
    )


FAMILIES: dict[str, Family] = {
    family.name: family for family in (*_training.FAMILIES, *_held_out.FAMILIES)
}
TASKS: dict[str, GeneratedTask] = {
    family.name: _task(family, held_out)
    for families, held_out in ((_training.FAMILIES, False), (_held_out.FAMILIES, True))
    for family in families
}


def generate(name: str, rows: int, seed: int) -> list[tuple[str, int]]:
    """Write labelled texts of a task; no text occurs twice.

    Args:
        name: a key of :data:`TASKS`.
        rows: how many texts.
        seed: the same seed gives the same rows, and a longer list starts with a shorter one.

    Returns:
        (text, class index) pairs, classes drawn uniformly and independently.
    """
    family = FAMILIES[name]
    chance = random.Random(f"{name} {seed}")
    seen: set[str] = set()
    result: list[tuple[str, int]] = []
    while len(result) < rows:
        label = chance.randrange(len(family.classes))
        text = family.write(label, chance)
        if text not in seen:
            seen.add(text)
            result.append((text, label))
    return result
