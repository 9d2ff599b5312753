"""The words of a prompt, and the tokens of each label word."""

from __future__ import annotations

import difflib
import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from abft_mlx.errors import PromptError, first_few
from abft_mlx.recipe import PromptSection

LabelWords = Mapping[str, str] | Literal["auto", "letters"] | None
_WAY_OUT = "map it to another word with prompt.label_words"


class Wording(Protocol):
    """How demonstrations and a query become a text: plain pieces, or the turns of a chat."""

    @property
    def brings_start(self) -> bool:
        """Whether special tokens at the start, such as a BOS, are part of the text."""

    @property
    def anchor(self) -> str:
        """What stands right before a demonstration's label; without the label's own space."""

    @property
    def ending(self) -> str:
        """What stands right before the label that is asked for."""

    @property
    def after_label(self) -> str:
        """What stands right after a demonstration's label."""

    def label(self, word: str) -> str:
        """A label word with the space that belongs to it."""

    def pieces(self, texts: Sequence[str], query: str) -> list[str]:
        """The K + 1 texts between which, in turn, the K labels stand."""

    def render(self, demonstrations: Sequence[tuple[str, str]], query: str) -> str:
        """The whole prompt as text, from (text, label word) pairs and a query."""

    def merges_before(self, word: str) -> str:
        """One line for a label word that merges with what stands before it."""

    def merges_after(self, word: str) -> str:
        """One line for a label word that merges with what stands after it."""

    def advice(self) -> str:
        """What to change where the tokenizer merges across pieces."""


@dataclass(frozen=True)
class Template:
    """The protocol's pieces, in the space-in-label form: a prompt ends in label_prefix.

    instruction + K times (input_prefix + text + input_affix + label_prefix + " " + word +
    label_affix) + query_prefix + input_prefix + query + input_affix + label_prefix
    """

    instruction: str = ""
    input_prefix: str = "text: "
    input_affix: str = " "
    label_prefix: str = "label:"
    label_affix: str = "\n"
    query_prefix: str = ""

    @classmethod
    def from_section(cls, section: PromptSection) -> Template:
        """The template of a recipe."""
        return cls(
            instruction=section.instruction,
            input_prefix=section.input_prefix,
            input_affix=section.input_affix,
            label_prefix=section.label_prefix,
            label_affix=section.label_affix,
            query_prefix=section.query_prefix,
        )

    @property
    def brings_start(self) -> bool:
        """False: the tokenizer puts its own special tokens before a plain text."""
        return False

    @property
    def anchor(self) -> str:
        """The label_prefix, or something in its place."""
        return self.label_prefix or self.input_prefix.strip() or "x"

    @property
    def ending(self) -> str:
        """A prompt ends as every input does."""
        return self.anchor

    @property
    def after_label(self) -> str:
        """The label_affix."""
        return self.label_affix

    def label(self, word: str) -> str:
        """The word behind its space."""
        return f" {word}"

    def body(self, text: str) -> str:
        """An input up to where its label belongs."""
        return self.input_prefix + text + self.input_affix + self.label_prefix

    def turns(self, texts: Sequence[str], query: str) -> list[str]:
        """The K + 1 bodies, with the instruction before the first and query_prefix in the last."""
        turns = [*map(self.body, texts), self.query_prefix + self.body(query)]
        turns[0] = self.instruction + turns[0]
        return turns

    def pieces(self, texts: Sequence[str], query: str) -> list[str]:
        """The K + 1 texts between which, in turn, the K labels stand."""
        first, *others = self.turns(texts, query)
        return [first, *(self.label_affix + turn for turn in others)]

    def render(self, demonstrations: Sequence[tuple[str, str]], query: str) -> str:
        """The whole prompt as text, from (text, label word) pairs and a query."""
        shown = (f"{self.body(text)} {word}{self.label_affix}" for text, word in demonstrations)
        return self.instruction + "".join(shown) + self.query_prefix + self.body(query)

    def merges_before(self, word: str) -> str:
        """One line for a label word that merges with label_prefix."""
        setting = "label_prefix" if self.label_prefix else "input_affix"
        return (
            f"prompt.{setting} {self.anchor!r} and the label word {word!r} merge in this "
            "model's vocabulary, so the label has no place of its own: end the prefix in a "
            "character that the vocabulary does not join to words (':', '=' or '>' perhaps)"
        )

    def merges_after(self, word: str) -> str:
        """One line for a label word that merges with label_affix."""
        advice = (
            f"end the word in a letter: {_WAY_OUT}"
            if self.label_affix.startswith("\n")
            else "begin the affix with a line break"
        )
        return (
            f"prompt.label_affix {self.label_affix!r} merges with the label word {word!r} in "
            f"this model's vocabulary: {advice}"
        )

    def advice(self) -> str:
        """Which piece touches its neighbours, and what to change."""
        if not self.label_affix.startswith("\n"):
            return f"begin prompt.label_affix ({self.label_affix!r}) with a line break"
        if not self.label_prefix:
            return "give prompt.label_prefix a word, such as 'label:'"
        return (
            f"end prompt.label_prefix ({self.label_prefix!r}) in another character, or "
            f"change prompt.label_affix ({self.label_affix!r})"
        )


@dataclass(frozen=True)
class LabelSpace:
    """The classes, and the words and tokens that stand for them in a prompt.

    Attributes:
        names: the classes' names in the data.
        words: the word of each in a prompt, without its space; "word" may be several words.
        token_ids: the tokens of each word in its place: of " " + word, except in chats without that
            space.
        targets: the tokens whose log-probabilities, summed, are the score of each class. They are
            those of its word, and behind them the token that follows a label where the word begins
            another one ("card", "card arrival"): without it "card" would score at least as high.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.targets:
            object.__setattr__(self, "targets", self.token_ids)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def single(self) -> bool:
        """Whether every word is one token, so that the logits of one position tell all scores."""
        return self.longest == 1

    @property
    def longest(self) -> int:
        """Tokens of the longest target."""
        return max(map(len, self.targets))

    @property
    def first_ids(self) -> tuple[int, ...]:
        """The first token of each word."""
        return tuple(ids[0] for ids in self.token_ids)

    def label_token(self, label: int) -> int:
        """Which token of a label's word is its label position, from 0: the last one.

        This is the only place that knows the rule. docs/prediction.md compares it with the first
        token that tells the classes apart.
        """
        return len(self.token_ids[label]) - 1


def label_space(
    tokenizer: Any, template: Wording, names: Sequence[str], label_words: LabelWords = None
) -> LabelSpace:
    """Find the tokens of every label word in its place between what stands before and after it.

    Args:
        tokenizer: anything with ``encode(text, add_special_tokens=False)`` and ``decode``.
        template: a plain template, or one in the turns of a chat.
        names: the classes.
        label_words: None or "auto" for the names themselves, whole; "letters" for A, B, C to Z and
            then AA, AB to ZZ; or a map from names to words, where a name that it lacks stands for
            itself.

    Raises:
        PromptError: a word has an unknown token, two words have the same tokens, or a word merges
            with what stands around it.
    """
    context = _Context(tokenizer, template)
    words = words_of(names, label_words)
    tokens = [tuple(context.tokens(word)) for word in words]
    for name, word, ids in zip(names, words, tokens, strict=True):
        if not ids or context.unknown in ids:
            raise PromptError(
                f"{_called(name, word)} is not in this model's vocabulary: {_WAY_OUT}"
            )
    seen: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(tokens):
        first = seen.setdefault(ids, index)
        if first != index:
            raise PromptError(
                f"{_called(names[first], words[first])} and {_called(names[index], words[index])} "
                f"are the same tokens, {tokenizer.decode(list(ids))!r}: {_WAY_OUT}"
            )
    context.check_neighbours(words)
    beginnings = {ids[:size] for ids in tokens for size in range(1, len(ids))}
    targets = [
        (*ids, context.following(name, word)) if ids in beginnings else ids
        for name, word, ids in zip(names, words, tokens, strict=True)
    ]
    return LabelSpace(tuple(names), tuple(words), tuple(tokens), tuple(targets))


def words_of(names: Sequence[str], label_words: LabelWords) -> list[str]:
    """The word that stands for each label.

    Args:
        names: the classes.
        label_words: as for `label_space`.

    Raises:
        PromptError: a word is empty or for no label, or there are too many labels for letters.
    """
    if label_words == "letters":
        return _letters(len(names))
    return _mapped(names, label_words if isinstance(label_words, Mapping) else {})


class _Context:
    """Encoding a label where it will stand."""

    def __init__(self, tokenizer: Any, wording: Wording) -> None:
        self.encode: Callable[[str], list[int]] = lambda text: list(
            tokenizer.encode(text, add_special_tokens=False)
        )
        self.unknown = getattr(tokenizer, "unk_token_id", None)
        self.wording = wording
        self.before = self.encode(wording.anchor)
        self.end = self.encode(wording.ending)

    def tokens(self, word: str) -> list[int]:
        """The tokens of a label word behind the anchor."""
        ids = self.encode(self.wording.anchor + self.wording.label(word))
        if ids[: len(self.before)] != self.before:
            raise PromptError(self.wording.merges_before(word))
        return ids[len(self.before) :]

    def following(self, name: str, word: str) -> int:
        """The token that follows a label word inside a prompt."""
        behind = self.tokens(word + self.wording.after_label)[len(self.tokens(word)) :]
        if not behind:
            raise PromptError(
                f"{_called(name, word)} begins another label word, and prompt.label_affix is empty,"
                f" so nothing shows where it ends: begin prompt.label_affix with a line break, or "
                f"{_WAY_OUT}"
            )
        return behind[0]

    def check_neighbours(self, words: Sequence[str]) -> None:
        """See that a label's tokens are the same before what follows it, and at a prompt's end."""
        for word in words:
            label = self.wording.label(word)
            ids = self.encode(self.wording.anchor + label)
            around = self.encode(self.wording.anchor + label + self.wording.after_label)
            if around[: len(ids)] != ids:
                raise PromptError(self.wording.merges_after(word))
            own = ids[len(self.before) :]
            if self.encode(self.wording.ending + label) != [*self.end, *own]:
                raise PromptError(self.wording.merges_before(word))


def _mapped(names: Sequence[str], words: Mapping[str, str]) -> list[str]:
    """The words that a map gives, or else the labels themselves."""
    for name in words:
        if name not in names:
            near = difflib.get_close_matches(name, list(names), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"labels are {first_few(names)}"
            raise PromptError(f"prompt.label_words has {name!r}, which is no label; {hint}")
    chosen = [words.get(name, name).strip() for name in names]
    for name, word in zip(names, chosen, strict=True):
        if not word:
            raise PromptError(f"prompt.label_words has an empty word for label {name!r}; give one")
    return chosen


def _letters(count: int) -> list[str]:
    """A to Z, then AA to ZZ."""
    alphabet = string.ascii_uppercase
    words = [*alphabet, *map("".join, itertools.product(alphabet, repeat=2))]
    if count > len(words):
        raise PromptError(
            f"prompt.label_words: letters stand for at most {len(words)} labels, and these are "
            f"{count}; use auto"
        )
    return words[:count]


def _called(name: str, word: str) -> str:
    """A label and its word, for a message."""
    return f"label {name!r}" if name == word else f"label {name!r} (word {word!r})"
