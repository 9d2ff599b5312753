"""Classification tasks that write themselves: English-like texts from word lists of our own.

A text's class shows in several of its words together, never in one marker: every class-bearing
slot of a sentence draws a word of the text's own class with the task's ``signal`` probability,
and of another class otherwise. Pure Python, the same texts everywhere for the same seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from abft_mlx.recipe.files import parse

DEMO_TASK = "intent"
"""The task of ``abft-mlx demo``; held out from the bundled base."""
_WORDS = Path(__file__).resolve().parent.parent / "assets" / "words.yaml"
_KINDS = {"N": "nouns", "A": "adjectives", "V": "verbs"}


@dataclass(frozen=True)
class Family:
    """One classification task: its template pieces, its classes' words and its difficulty."""

    name: str  # what data.source calls it
    summary: str  # what the label says about a text
    held_out: bool  # whether the bundled base never saw these labels in a prompt
    input_prefix: str
    label_prefix: str
    signal: float  # probability that a slot is filled from the text's own class
    templates: tuple[str, ...]  # sentence patterns, beside the shared ones
    classes: Mapping[str, Mapping[str, tuple[str, ...]]]  # label to its words by slot (N, A, V)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label words, in class order."""
        return tuple(self.classes)

    def write(self, label: int, chance: random.Random) -> str:
        """Write one text of a class."""
        pools = list(self.classes.values())
        template = chance.choice(self.templates + SHARED_TEMPLATES)
        words: list[str] = []
        for piece in template.split():
            if piece in NEUTRAL:
                words += chance.choice(NEUTRAL[piece]).split()
            elif piece in _KINDS:
                source = label
                if chance.random() >= self.signal:
                    source = (label + 1 + chance.randrange(len(pools) - 1)) % len(pools)
                words.append(chance.choice(pools[source][piece]))
            else:
                words.append(piece)
        for index, word in enumerate(words[:-1]):
            if word == "a" and words[index + 1][0] in "aeiou":
                words[index] = "an"
        return " ".join(words)


def _read() -> tuple[dict[str, tuple[str, ...]], tuple[str, ...], dict[str, Family]]:
    """Neutral words by slot, shared sentence patterns, and the tasks by name."""
    values = parse(_WORDS.read_text(encoding="utf-8"), str(_WORDS))
    neutral = {slot: tuple(words.split("|")) for slot, words in values["neutral"].items()}
    families = {}
    for name, family in values["families"].items():
        family["classes"] = {
            label: {slot: tuple(lists[kind].split()) for slot, kind in _KINDS.items()}
            for label, lists in family["classes"].items()
        }
        family["templates"] = tuple(family["templates"])
        families[name] = Family(name, **family)
    return neutral, tuple(values["templates"]), families


NEUTRAL, SHARED_TEMPLATES, TASKS = _read()


def generate(name: str, rows: int, seed: int) -> list[tuple[str, int]]:
    """Write labelled texts of a task; no text occurs twice.

    Args:
        name: a key of ``TASKS``.
        rows: how many texts.
        seed: the same seed gives the same rows, and a longer list starts with a shorter one.

    Returns:
        (text, class index) pairs, classes drawn uniformly and independently.
    """
    family = TASKS[name]
    chance = random.Random(f"{name} {seed}")
    rows_by_text: dict[str, int] = {}
    while len(rows_by_text) < rows:
        label = chance.randrange(len(family.classes))
        rows_by_text.setdefault(family.write(label, chance), label)
    return list(rows_by_text.items())
