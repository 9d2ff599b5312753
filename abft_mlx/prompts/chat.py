"""Prompts as the turns of a chat, in the form of a model's own chat template.

User turns hold the texts, assistant turns the labels. What a chat template writes around turns is
learned from one chat of placeholders for every number of demonstrations; label positions follow
from these pieces as in plain prompts, and none is searched for in a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import date
from typing import Any

from abft_mlx.errors import PromptError
from abft_mlx.prompts.template import Template

# Templates that write today's date write this one, so that prompts are the same tomorrow. Llama's
# name this day themselves where they know no other.
DATE = date(2024, 7, 26)
_WAY_OUT = "set prompt.chat=false for plain prompts"


class ChatTemplate:
    """A template's words in the turns of a chat.

    The first user turn is instruction + input_prefix + text + input_affix + label_prefix, the
    others without instruction, the query's with query_prefix before it; spaces and line breaks at a
    turn's ends are left out, as many chat templates do. An assistant turn is the label word alone:
    label_affix has no place. A prompt ends in the chat template's generation prompt.

    A space between an assistant turn's header and its label belongs to the label, as in plain
    prompts; a generation prompt that ends in the same space ends without it.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        """Learn what the tokenizer's chat template writes around turns.

        Args:
            tokenizer: has ``apply_chat_template``.
            template: the words of user turns.

        Raises:
            PromptError: no chat template, or none that labels can be read from.
        """
        self.template = template
        self._tokenizer = tokenizer
        self._options = _options(tokenizer)
        self._frames: dict[int, tuple[str, ...]] = {}
        _, header, after, ending = self.frame(1)
        self.anchor = header.rstrip(" ")
        self._space = header[len(self.anchor) :]
        self.ending = ending.removesuffix(self._space)
        self.after_label = after
        if not self.ending.startswith(self.anchor):
            raise PromptError(
                f"this model's chat template ends a prompt in {_end(ending)!r}, where assistant "
                f"turns begin with {_end(header)!r}, so that a label has no place right behind a "
                f"prompt: {_WAY_OUT}"
            )

    @property
    def brings_start(self) -> bool:
        """True: a chat template writes a BOS where the model wants one."""
        return True

    def label(self, word: str) -> str:
        """The word as it stands in an assistant turn, with the space before it if there is one."""
        return self._space + word

    def frame(self, demonstrations: int) -> tuple[str, ...]:
        """The texts around 2 K + 1 turns: 2 K + 2, the last of them the generation prompt.

        Args:
            demonstrations: K.

        Raises:
            PromptError: the chat template fails, or does not write every turn once and in order.
        """
        if demonstrations not in self._frames:
            users = [f"abft-user-{number}-turn" for number in range(demonstrations + 1)]
            words = [f"abft-assistant-{number}-turn" for number in range(demonstrations)]
            turns = [turn for pair in zip(users, words, strict=False) for turn in pair]
            whole = left = self._rendered(users, words)
            found = []
            for number, turn in enumerate([*turns, users[-1]], start=1):
                if whole.count(turn) != 1 or turn not in left:
                    raise PromptError(
                        f"this model's chat template does not write turn {number} of "
                        f"{len(turns) + 1} once and in its place: {_WAY_OUT}"
                    )
                before, _, left = left.partition(turn)
                found.append(before)
            self._frames[demonstrations] = (*found, left)
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
            f"({_end(self.anchor)!r}) and the generation prompt ({_end(self.ending)!r}) in this "
            f"model's vocabulary: choose another with prompt.label_words, or {_WAY_OUT}"
        )

    def merges_after(self, word: str) -> str:
        """One line for a label word that merges with the end of its turn."""
        return (
            f"what the chat template writes behind an assistant turn ({self.after_label[:24]!r}) "
            f"merges with the label word {word!r} in this model's vocabulary: choose another with "
            f"prompt.label_words, or {_WAY_OUT}"
        )

    def advice(self) -> str:
        """What to change where the tokenizer merges across pieces."""
        return _WAY_OUT

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
                f"{_WAY_OUT}"
            ) from error


def _options(tokenizer: Any) -> dict[str, Any]:
    """What a chat template is told: answer at once, and which day it is if it asks.

    Raises:
        PromptError: there is no chat template.
    """
    written = getattr(tokenizer, "chat_template", None)
    if not getattr(tokenizer, "has_chat_template", written is not None):
        raise PromptError(
            "this model's tokenizer has no chat template, which prompt.chat=true asks for: choose "
            f"an instruct model that has one, or {_WAY_OUT}"
        )
    # mlx-lm's wrapper would ask for thoughts, and a label would follow only after them.
    options: dict[str, Any] = {"enable_thinking": False}
    if isinstance(written, str) and "strftime_now" in written:
        codes = "".join(f"|replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "aAbBdjmyYHMSp")
        # The line break falls to Jinja's trim_blocks, and the template begins on its own line.
        macro = f"{{% macro strftime_now(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}\n"
        options["chat_template"] = macro + written
    return options


def _end(text: str) -> str:
    """The last characters of a text, for a message."""
    return text[-32:]
