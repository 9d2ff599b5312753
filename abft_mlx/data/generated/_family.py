"""What a task family is made of, and how one text of it is written."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


def _split(words: str, at: str | None = None) -> tuple[str, ...]:
    return tuple(words.split(at))


NEUTRAL = {
    "_n": _split(
        "table door street window box chair road letter wall morning bag house lamp corner town "
        "garden picture bridge paper room week story clock village neighbour cousin bus hill"
    ),
    "_a": _split(
        "small big old new long short round second plain quiet tall wide heavy light other same"
    ),
    "_w": _split(
        "anna ben clara david ella felix grace henry iris jonas kate leo mia noah olga peter"
    ),
    "_t": _split(
        "today|yesterday|last week|again|in the morning|on monday|after that|at noon|this year|"
        "before dinner|late at night|once more|on friday|a while ago|in spring|all day",
        "|",
    ),
}
"""Words that tell nothing about a class: nouns, adjectives, names, and times."""

SHARED_TEMPLATES = (
    "the A N V the N and the _n was A",
    "A N V a _a _n while the N V",
    "the N V _t and a A N V",
    "_w said that the A N V a N",
    "a A N and the _a _n V near the N",
    "the _n V when the A N met the N",
    "there was a N _t which V the A N",
    "after the N V we saw a A N and _w",
)
"""Sentence patterns every family uses: N, A and V stand for words that bear the class."""


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


def lexicon(nouns: str, adjectives: str, verbs: str) -> Words:
    """Build :class:`Words` from three strings, split on white space."""
    return Words(tuple(nouns.split()), tuple(adjectives.split()), tuple(verbs.split()))


@dataclass(frozen=True)
class Family:
    """One classification task: its template pieces, its classes' words and its difficulty.

    Attributes:
        name: the task's name.
        summary: what the label says about a text.
        input_prefix: what stands before a text, with its trailing space.
        label_prefix: what stands before a label, without a trailing space.
        signal: probability that a class-bearing slot is filled from the text's own class; otherwise
            the word comes from another class of the family.
        templates: sentence patterns of this family, beside the shared ones.
        classes: label word to its words, in label order.
    """

    name: str
    summary: str
    input_prefix: str
    label_prefix: str
    signal: float
    templates: tuple[str, ...]
    classes: Mapping[str, Words]

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
        return " ".join(_with_articles(words))


def _with_articles(words: list[str]) -> list[str]:
    fixed = list(words)
    for index, word in enumerate(words[:-1]):
        if word == "a" and words[index + 1][0] in "aeiou":
            fixed[index] = "an"
    return fixed
