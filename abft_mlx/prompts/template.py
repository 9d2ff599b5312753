"""The words of a prompt, plain or in the turns of a chat, and the tokens of each label word."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from abft_mlx.errors import PromptError, first_few
from abft_mlx.recipe import PromptSection

LabelWords = Mapping[str, str] | Literal["auto", "letters"] | None
# Chat templates that write today's date write this one, so that prompts are the same tomorrow.
# Llama's name this day themselves where they know no other.
DATE = date(2024, 7, 26)
_OTHER_WORD = "map it to another word with prompt.label_words"
_PLAIN = "set prompt.chat=false for plain prompts"


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

    # Whether special tokens at the start, such as a BOS, are part of the text.
    brings_start = False

    @classmethod
    def from_section(cls, section: PromptSection) -> Template:
        """The template of a recipe."""
        return cls(**{name: getattr(section, name) for name in cls.__dataclass_fields__})

    @property
    def anchor(self) -> str:
        """What stands right before a demonstration's label: label_prefix, or something like it."""
        return self.label_prefix or self.input_prefix.strip() or "x"

    @property
    def ending(self) -> str:
        """What stands right before the label that is asked for."""
        return self.anchor

    @property
    def after_label(self) -> str:
        """What stands right after a demonstration's label."""
        return self.label_affix

    def label(self, word: str) -> str:
        """A label word with the space that belongs to it."""
        return f" {word}"

    def turns(self, texts: Sequence[str], query: str) -> list[str]:
        """K + 1 inputs up to their labels, instruction and query_prefix included."""
        turns = [
            self.input_prefix + text + self.input_affix + self.label_prefix
            for text in (*texts, query)
        ]
        turns[-1] = self.query_prefix + turns[-1]
        turns[0] = self.instruction + turns[0]
        return turns

    def pieces(self, texts: Sequence[str], query: str) -> list[str]:
        """The K + 1 texts between which, in turn, the K labels stand."""
        first, *others = self.turns(texts, query)
        return [first, *(self.label_affix + turn for turn in others)]

    def render(self, demonstrations: Sequence[tuple[str, str]], query: str) -> str:
        """The whole prompt as text, from (text, label word) pairs and a query."""
        pieces = self.pieces([text for text, _ in demonstrations], query)
        labels = [*(self.label(word) for _, word in demonstrations), ""]
        return "".join(itertools.chain(*zip(pieces, labels, strict=True)))

    def merges_before(self, word: str) -> str:
        """One line for a label word that merges with what stands before it."""
        setting = "label_prefix" if self.label_prefix else "input_affix"
        return (
            f"prompt.{setting} {self.anchor!r} and the label word {word!r} merge in this "
            "model's vocabulary, so the label has no place of its own: end the prefix in a "
            "character that the vocabulary does not join to words (':', '=' or '>' perhaps)"
        )

    def merges_after(self, word: str) -> str:
        """One line for a label word that merges with what stands after it."""
        advice = "begin the affix with a line break"
        if self.label_affix.startswith("\n"):
            advice = f"end the word in a letter: {_OTHER_WORD}"
        return (
            f"prompt.label_affix {self.label_affix!r} merges with the label word {word!r} in "
            f"this model's vocabulary: {advice}"
        )

    def advice(self) -> str:
        """What to change where the tokenizer merges across pieces."""
        if not self.label_affix.startswith("\n"):
            return f"begin prompt.label_affix ({self.label_affix!r}) with a line break"
        if not self.label_prefix:
            return "give prompt.label_prefix a word, such as 'label:'"
        return (
            f"end prompt.label_prefix ({self.label_prefix!r}) in another character, or "
            f"change prompt.label_affix ({self.label_affix!r})"
        )


class ChatTemplate:
    """A template's words in the turns of a chat, in the form of a model's own chat template.

    User turns hold the texts, assistant turns the label words. The first user turn is instruction +
    input_prefix + text + input_affix + label_prefix, the others without instruction, the query's
    with query_prefix before it; spaces and line breaks at a turn's ends are left out, as many chat
    templates do. label_affix has no place. A prompt ends in the chat template's generation prompt.

    What a chat template writes around turns is learned from one chat of placeholders for every
    number of demonstrations. A space between an assistant turn's header and its label belongs to
    the label, as in plain prompts; a generation prompt that ends in the same space ends without it.
    """

    # A chat template writes a BOS where the model wants one.
    brings_start = True

    def __init__(self, tokenizer: Any, template: Template) -> None:
        """Learn what the tokenizer's chat template writes around turns.

        Raises:
            PromptError: no chat template, or none that labels can be read from.
        """
        self.template = template
        self._tokenizer = tokenizer
        self._options = _chat_options(tokenizer)
        self._frames: dict[int, tuple[str, ...]] = {}
        _, header, self.after_label, ending = self.frame(1)
        self.anchor = header.rstrip(" ")
        self._space = header[len(self.anchor) :]
        self.ending = ending.removesuffix(self._space)
        if not self.ending.startswith(self.anchor):
            raise PromptError(
                f"this model's chat template ends a prompt in {ending[-32:]!r}, where assistant "
                f"turns begin with {header[-32:]!r}, so that a label has no place right behind a "
                f"prompt: {_PLAIN}"
            )

    def label(self, word: str) -> str:
        """The word as it stands in an assistant turn, with the space before it if there is one."""
        return self._space + word

    def frame(self, demonstrations: int) -> tuple[str, ...]:
        """The texts around 2 K + 1 turns: 2 K + 2, the last of them the generation prompt.

        Raises:
            PromptError: the chat template fails, or does not write every turn once and in order.
        """
        if demonstrations not in self._frames:
            users = [f"abft-user-{number}-turn" for number in range(demonstrations + 1)]
            words = [f"abft-assistant-{number}-turn" for number in range(demonstrations)]
            turns = [*itertools.chain(*zip(users, words, strict=False)), users[-1]]
            whole = rest = self._rendered(users, words)
            frame = []
            for number, turn in enumerate(turns, start=1):
                if whole.count(turn) != 1 or turn not in rest:
                    raise PromptError(
                        f"this model's chat template does not write turn {number} of {len(turns)} "
                        f"once and in its place: {_PLAIN}"
                    )
                before, _, rest = rest.partition(turn)
                frame.append(before)
            self._frames[demonstrations] = (*frame, rest)
        return self._frames[demonstrations]

    def fingerprint(self, demonstrations: int) -> str:
        """What identifies the texts around the turns of K demonstrations and a query."""
        frame = json.dumps(self.frame(demonstrations))
        return f"sha256:{hashlib.sha256(frame.encode()).hexdigest()}"

    def pieces(self, texts: Sequence[str], query: str) -> list[str]:
        """The K + 1 texts between which, in turn, the K labels stand."""
        frame = self.frame(len(texts))
        return [
            frame[2 * number] + turn + frame[2 * number + 1].removesuffix(self._space)
            for number, turn in enumerate(self._turns(texts, query))
        ]

    def render(self, demonstrations: Sequence[tuple[str, str]], query: str) -> str:
        """What the chat template makes of (text, label word) pairs and a query."""
        users = self._turns([text for text, _ in demonstrations], query)
        whole = self._rendered(users, [word for _, word in demonstrations])
        return whole.removesuffix(self._space)

    def merges_before(self, word: str) -> str:
        """One line for a label word that merges with the header of its turn."""
        return (
            f"the label word {word!r} is not the same tokens behind an assistant header "
            f"({self.anchor[-32:]!r}) and the generation prompt ({self.ending[-32:]!r}) in this "
            f"model's vocabulary: choose another with prompt.label_words, or {_PLAIN}"
        )

    def merges_after(self, word: str) -> str:
        """One line for a label word that merges with the end of its turn."""
        return (
            f"what the chat template writes behind an assistant turn ({self.after_label[:24]!r}) "
            f"merges with the label word {word!r} in this model's vocabulary: choose another with "
            f"prompt.label_words, or {_PLAIN}"
        )

    def advice(self) -> str:
        """What to change where the tokenizer merges across pieces."""
        return _PLAIN

    def _turns(self, texts: Sequence[str], query: str) -> list[str]:
        """The K + 1 user turns."""
        return [turn.strip() for turn in self.template.turns(texts, query)]

    def _rendered(self, users: Sequence[str], words: Sequence[str]) -> str:
        """What the chat template writes of K + 1 user turns and K assistant turns."""
        messages = [{"role": "user", "content": users[0]}]
        for word, user in zip(words, users[1:], strict=True):
            messages.append({"role": "assistant", "content": word})
            messages.append({"role": "user", "content": user})
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._options
            )
        except Exception as error:  # templates come with models and raise whatever they meet
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PromptError(
                f"this model's chat template fails on user and assistant turns ({reason:.120}): "
                f"{_PLAIN}"
            ) from error


Wording = Template | ChatTemplate


def _chat_options(tokenizer: Any) -> dict[str, Any]:
    """What a chat template is told: answer at once, and which day it is if it asks."""
    template = getattr(tokenizer, "chat_template", None)
    if not getattr(tokenizer, "has_chat_template", template is not None):
        raise PromptError(
            "this model's tokenizer has no chat template, which prompt.chat=true asks for: choose "
            f"an instruct model that has one, or {_PLAIN}"
        )
    # mlx-lm's wrapper would ask for thoughts, and a label would follow only after them.
    options: dict[str, Any] = {"enable_thinking": False}
    if isinstance(template, str) and "strftime_now" in template:
        codes = "".join(f"|replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "aAbBdjmyYHMSp")
        # The line break falls to Jinja's trim_blocks, and the template begins on its own line.
        macro = f"{{% macro strftime_now(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}\n"
        options["chat_template"] = macro + template
    return options


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
    def longest(self) -> int:
        """Tokens of the longest target; if 1, the logits of one position give all scores."""
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

    ``names`` are the classes, ``label_words`` as for :func:`words_of`.

    Raises:
        PromptError: a word has an unknown token, two words have the same tokens, or a word merges
            with what stands around it.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    words = words_of(names, label_words)
    before, ending = encode(template.anchor), encode(template.ending)
    unknown = getattr(tokenizer, "unk_token_id", None)
    owners: dict[tuple[int, ...], str] = {}
    following: list[list[int]] = []
    for name, word in zip(names, words, strict=True):
        title = f"label {name!r}" if name == word else f"label {name!r} (word {word!r})"
        label = template.label(word)
        ids = encode(template.anchor + label)
        own = tuple(ids[len(before) :])
        if ids[: len(before)] != before:
            raise PromptError(template.merges_before(word))
        if not own or unknown in own:
            raise PromptError(f"{title} is not in this model's vocabulary: {_OTHER_WORD}")
        if own in owners:
            raise PromptError(
                f"{owners[own]} and {title} are the same tokens, "
                f"{tokenizer.decode(list(own))!r}: {_OTHER_WORD}"
            )
        owners[own] = title
        around = encode(template.anchor + label + template.after_label)
        if around[: len(ids)] != ids:
            raise PromptError(template.merges_after(word))
        if encode(template.ending + label) != [*ending, *own]:
            raise PromptError(template.merges_before(word))
        following.append(around[len(ids) :])
    beginnings = {ids[:size] for ids in owners for size in range(1, len(ids))}
    targets = []
    for (own, title), behind in zip(owners.items(), following, strict=True):
        if own in beginnings and not behind:
            raise PromptError(
                f"{title} begins another label word, and prompt.label_affix is empty,"
                f" so nothing shows where it ends: begin prompt.label_affix with a line break, or "
                f"{_OTHER_WORD}"
            )
        targets.append((*own, behind[0]) if own in beginnings else own)
    return LabelSpace(tuple(names), tuple(words), tuple(owners), tuple(targets))


def words_of(names: Sequence[str], label_words: LabelWords) -> list[str]:
    """The word that stands for each label.

    None or "auto" means the names themselves, whole; "letters" A to Z and then AA to ZZ; in a map
    from names to words, a name that it lacks stands for itself.

    Raises:
        PromptError: a word is empty or for no label, or there are too many labels for letters.
    """
    if label_words == "letters":
        pairs = itertools.product(string.ascii_uppercase, repeat=2)
        letters = [*string.ascii_uppercase, *map("".join, pairs)]
        if len(names) > len(letters):
            raise PromptError(
                f"prompt.label_words: letters stand for at most {len(letters)} labels, and these "
                f"are {len(names)}; use auto"
            )
        return letters[: len(names)]
    mapped = label_words if isinstance(label_words, Mapping) else {}
    for name in mapped:
        if name not in names:
            near = difflib.get_close_matches(name, list(names), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"labels are {first_few(names)}"
            raise PromptError(f"prompt.label_words has {name!r}, which is no label; {hint}")
    words = [mapped.get(name, name).strip() for name in names]
    for name, word in zip(names, words, strict=True):
        if not word:
            raise PromptError(f"prompt.label_words has an empty word for label {name!r}; give one")
    return words
