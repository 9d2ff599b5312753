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


@dataclass(frozen=True)
class Words:
    """The words of one class.

    Attributes:
        nouns: at least ten, like the two others.
        adjectives: words that can stand before a noun.
        verbs: past forms.
    """

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    def of(self, slot: str) -> tuple[str, ...]:
        """The list that fills a slot: N, A or V."""
        return {"N": self.nouns, "A": self.adjectives, "V": self.verbs}[slot]

    def all(self) -> tuple[str, ...]:
        """Every word of the class."""
        return self.nouns + self.adjectives + self.verbs


@dataclass(frozen=True)
class Family:
    """One classification task: its template pieces, its classes' words and its difficulty.

    Attributes:
        name: what ``data.source`` calls it.
        summary: what the label says about a text.
        held_out: True if the bundled base never saw these labels in a prompt.
        input_prefix: what stands before a text, with its trailing space.
        label_prefix: what stands before a label, without a trailing space.
        signal: probability that a class-bearing slot is filled from the text's own class; otherwise
            the word comes from another class of the family.
        templates: sentence patterns of this family, beside the shared ones.
        classes: label word to its words, in label order.
    """

    name: str
    summary: str
    held_out: bool
    input_prefix: str
    label_prefix: str
    signal: float
    templates: tuple[str, ...]
    classes: Mapping[str, Words]

    @property
    def labels(self) -> tuple[str, ...]:
        """Label words, in class order."""
        return tuple(self.classes)

    def write(self, label: int, chance: random.Random) -> str:
        """Write one text of a class.

        Args:
            label: index of the class.
            chance: where all choices come from.
        """
        pools = list(self.classes.values())
        template = chance.choice(self.templates + SHARED_TEMPLATES)
        words: list[str] = []
        for piece in template.split():
            if piece in NEUTRAL:
                words.extend(chance.choice(NEUTRAL[piece]).split())
            elif piece in ("N", "A", "V"):
                source = label
                if chance.random() >= self.signal:
                    source = (label + 1 + chance.randrange(len(pools) - 1)) % len(pools)
                words.append(chance.choice(pools[source].of(piece)))
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
        classes = {
            label: Words(*(tuple(lists[kind].split()) for kind in ("nouns", "adjectives", "verbs")))
            for label, lists in family.pop("classes").items()
        }
        templates = tuple(family.pop("templates"))
        families[name] = Family(name, templates=templates, classes=classes, **family)
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
    seen: set[str] = set()
    result: list[tuple[str, int]] = []
    while len(result) < rows:
        label = chance.randrange(len(family.classes))
        text = family.write(label, chance)
        if text not in seen:
            seen.add(text)
            result.append((text, label))
    return result
