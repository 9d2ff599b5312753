"""The words of a prompt, and the one token that stands for each label."""

from __future__ import annotations

import difflib
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from abft_mlx.errors import PromptError
from abft_mlx.recipe import PromptSection

LabelWords = Mapping[str, str] | Literal["auto"] | None
_WAY_OUT = (
    "map it to a word of one token with prompt.label_words, or let prompt.label_words: auto choose"
)


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
        return (
            f"prompt.label_affix {self.label_affix!r} merges with the label word {word!r} in "
            "this model's vocabulary: begin the affix with a line break"
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
    """The classes, and the word and token that stand for each in a prompt.

    Attributes:
        names: the classes' names in the data.
        words: the word of each in a prompt, without its space.
        token_ids: the one token of each in its place: of " " + word, except in chats without that
            space.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    token_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def chosen(self) -> str | None:
        """One line naming the words that differ from their labels, or None."""
        pairs = zip(self.names, self.words, strict=True)
        differing = [f"{name} -> {word}" for name, word in pairs if name != word]
        return "label words: " + ", ".join(differing) if differing else None


def label_space(
    tokenizer: Any, template: Wording, names: Sequence[str], label_words: LabelWords = None
) -> LabelSpace:
    """Find the one token of every label in its place between what stands before and after it.

    Args:
        tokenizer: anything with ``encode(text, add_special_tokens=False)`` and ``decode``.
        template: a plain template, or one in the turns of a chat.
        names: the classes.
        label_words: a map from names to words (a name that it lacks stands for itself); "auto" for
            the names where each is one token, else their first tokens where those differ, else
            letters; None for the names.

    Raises:
        PromptError: a label is not one token, two share one, or a label piece merges with it.
    """
    context = _Context(tokenizer, template)
    words = _choose(context, names) if label_words == "auto" else _mapped(names, label_words or {})
    tokens = [context.tokens(word) for word in words]
    for name, word, ids in zip(names, words, tokens, strict=True):
        if len(ids) != 1:
            pieces = ", ".join(repr(tokenizer.decode([token])) for token in ids)
            raise PromptError(
                f"{_called(name, word)} is {len(ids)} tokens ({pieces}) in this model's "
                f"vocabulary, and must be one: {_WAY_OUT}"
            )
        if ids[0] == context.unknown:
            raise PromptError(
                f"{_called(name, word)} is not in this model's vocabulary: {_WAY_OUT}"
            )
    token_ids = tuple(ids[0] for ids in tokens)
    for index, token in enumerate(token_ids):
        first = token_ids.index(token)
        if first != index:
            raise PromptError(
                f"{_called(names[first], words[first])} and {_called(names[index], words[index])} "
                f"share the token {tokenizer.decode([token])!r}: {_WAY_OUT}"
            )
    context.check_neighbours(words)
    return LabelSpace(tuple(names), tuple(words), token_ids)


class _Context:
    """Encoding a label where it will stand."""

    def __init__(self, tokenizer: Any, wording: Wording) -> None:
        self.encode: Callable[[str], list[int]] = lambda text: list(
            tokenizer.encode(text, add_special_tokens=False)
        )
        self.decode = tokenizer.decode
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

    def check_neighbours(self, words: Sequence[str]) -> None:
        """See that a label's token is the same before what follows it, and at a prompt's end."""
        for word in words:
            label = self.wording.label(word)
            ids = self.encode(self.wording.anchor + label)
            around = self.encode(self.wording.anchor + label + self.wording.after_label)
            if around[: len(ids)] != ids:
                raise PromptError(self.wording.merges_after(word))
            if self.encode(self.wording.ending + label) != [*self.end, ids[-1]]:
                raise PromptError(self.wording.merges_before(word))

    def single(self, word: str) -> int | None:
        """The one known token of a label word, if it has one."""
        ids = self.tokens(word)
        return ids[0] if len(ids) == 1 and ids[0] != self.unknown else None


def _mapped(names: Sequence[str], words: Mapping[str, str]) -> list[str]:
    for name in words:
        if name not in names:
            near = difflib.get_close_matches(name, list(names), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"labels are {', '.join(names)}"
            raise PromptError(f"prompt.label_words has {name!r}, which is no label; {hint}")
    chosen = [words.get(name, name).strip() for name in names]
    for name, word in zip(names, chosen, strict=True):
        if not word:
            raise PromptError(f"prompt.label_words has an empty word for label {name!r}; give one")
    return chosen


def _choose(context: _Context, names: Sequence[str]) -> list[str]:
    """Words of one token each: the names, or their first tokens, or letters."""
    firsts = [context.decode(context.tokens(name)[:1]).strip() for name in names]
    letters = string.ascii_uppercase + string.ascii_lowercase
    for words in (list(names), firsts, [*letters[: len(names)]]):
        tokens = [context.single(word) if word else None for word in words]
        if None not in tokens and len(set(tokens)) == len(names) == len(words):
            return words
    raise PromptError(
        f"prompt.label_words: auto finds no {len(names)} words of one token each in this model's "
        "vocabulary, neither first tokens nor letters: map each label to a word yourself"
    )


def _called(name: str, word: str) -> str:
    return f"label {name!r}" if name == word else f"label {name!r} (word {word!r})"
