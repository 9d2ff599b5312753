"""Prompts as tokens, assembled from pieces: every position is known and none is searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abft_mlx.errors import PromptError
from abft_mlx.prompts.template import LabelSpace, Wording


@dataclass(frozen=True)
class Prompt:
    """One few-shot prompt.

    Attributes:
        token_ids: T tokens, special ones at the start included.
        label_positions: K positions, of the last token of each demonstration's label word
            (:meth:`LabelSpace.label_token`).
        demonstration_labels: K class numbers.
        gold: the query's class number.
        target: the tokens that answer rightly, one or more (:attr:`LabelSpace.targets`).
    """

    token_ids: tuple[int, ...]
    label_positions: tuple[int, ...]
    demonstration_labels: tuple[int, ...]
    gold: int
    target: tuple[int, ...]

    @property
    def last(self) -> int:
        """The position whose attention row is looked at, and that predicts the label."""
        return len(self.token_ids) - 1


# Texts and pieces whose tokens are kept, some tens of megabytes; then they are forgotten.
KEPT = 2**14
# So many of a builder's first prompts are compared with the tokens of their whole text, and then
# every so many-th. What merges mostly does so in every prompt.
VERIFIED, EVERY = 64, 16


class PromptBuilder:
    """Assembles prompts, and checks of some that their pieces are how their text is tokenised.

    A prompt is its head (what stands up to the first label), then a label word and a tail (what
    stands up to the next label, or to the end) in turn. A tail is encoded behind its label word, so
    that tokenizers which put a space before a text, or merge across pieces, encode it as they would
    inside the prompt.

    Attributes:
        shortened: how many distinct texts were cut to max_text_tokens; one that comes again after
            KEPT others may count again.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Wording,
        space: LabelSpace,
        *,
        max_text_tokens: int | None = None,
        context_tokens: int | None = None,
        allow_empty: bool = False,
    ) -> None:
        """Prepare to build prompts.

        Args:
            tokenizer: anything with ``encode(text, add_special_tokens=False)``.
            template: a plain template, or one in the turns of a chat.
            space: the tokens of each label, from `label_space`.
            max_text_tokens: longer texts are shortened to this.
            context_tokens: longer prompts are refused.
            allow_empty: let empty texts pass (a data set has some; calibration asks for one).
        """
        self.tokenizer = tokenizer
        self.template = template
        self.space = space
        self.max_text_tokens = max_text_tokens
        self.context_tokens = context_tokens
        self.allow_empty = allow_empty
        self.shortened = 0
        self._built = 0
        self._texts: dict[str, str] = {}
        self._tokens: dict[tuple[int | None, str], list[int]] = {}
        self._start = [] if template.brings_start else _start_tokens(tokenizer)
        anchors = [template.anchor + template.label(word) for word in space.words]
        self._anchors = [(anchor, len(self._encode(anchor))) for anchor in anchors]

    @property
    def start(self) -> int | None:
        """The special token, such as a BOS, that begins every prompt, or None."""
        return self._start[0] if self._start else None

    def build(
        self,
        demonstrations: Sequence[tuple[str, int]],
        query: str,
        gold: int,
        *,
        where: str = "prompt",
    ) -> Prompt:
        """Assemble a prompt from K pairs of text and class number, a query and its class number.

        Raises:
            PromptError: an empty text, a prompt over the context, or pieces that merge; it calls
                the prompt ``where``.
        """
        texts = [self._text(text, where) for text, _ in demonstrations]
        query = self._text(query, where)
        labels = tuple(label for _, label in demonstrations)
        pieces = self.template.pieces(texts, query)
        ids = [*self._start, *self._piece(None, pieces[0])]
        positions = []
        for label, tail in zip(labels, pieces[1:], strict=True):
            positions.append(len(ids) + self.space.label_token(label))
            ids += self.space.token_ids[label]
            ids += self._piece(label, tail)
        # What comes after the first token of an answer is read behind the prompt.
        needed = len(ids) + self.space.longest - 1
        if self.context_tokens is not None and needed > self.context_tokens:
            longest = max(len(self._encode(text)) for text in [*texts, query])
            raise PromptError(
                f"{where} is {needed} tokens long and the model's context is "
                f"{self.context_tokens}: set prompt.max_text_tokens to shorten long texts (the "
                f"longest here has {longest} tokens), or lower prompt.demonstrations"
            )
        self._built += 1
        if self._built <= VERIFIED or self._built % EVERY == 0:
            words = [self.space.words[label] for label in labels]
            whole = self.template.render(list(zip(texts, words, strict=True)), query)
            self._verify(pieces, words, whole, ids[len(self._start) :], where)
        return Prompt(tuple(ids), tuple(positions), labels, gold, self.space.targets[gold])

    def text(self, demonstrations: Sequence[tuple[str, int]], query: str) -> str:
        """The prompt that `build` assembles, as text without special tokens."""
        shown = [
            (self._text(text, "prompt"), self.space.words[label]) for text, label in demonstrations
        ]
        return self.template.render(shown, self._text(query, "prompt"))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _piece(self, label: int | None, piece: str) -> list[int]:
        """The tokens of what follows a label, or None begins a prompt."""
        key = (label, piece)
        if key not in self._tokens:
            anchor, size = ("", 0) if label is None else self._anchors[label]
            _keep(self._tokens, key, self._encode(anchor + piece)[size:])
        return self._tokens[key]

    def _verify(
        self, pieces: list[str], words: list[str], text: str, ids: list[int], where: str
    ) -> None:
        """Check that the pieces make up the text, and their tokens are those of the whole text."""
        labels = [*map(self.template.label, words), ""]
        joined = "".join(piece + label for piece, label in zip(pieces, labels, strict=True))
        if joined != text:  # chat templates may change turns
            at = _first_difference(text, joined)
            theirs, ours = (part[max(0, at - 8) : at + 24] for part in (text, joined))
            raise PromptError(
                f"{where}: this model's chat template changes what stands in a turn: it writes "
                f"{theirs!r} where its turns make {ours!r}; set prompt.chat=false, or change "
                "the text"
            )
        whole = self._encode(text)
        if whole != ids:
            same = _first_difference(whole, ids)
            near = self.tokenizer.decode(whole[max(0, same - 2) : same + 2])
            raise PromptError(
                f"{where}: this model's tokenizer merges across the pieces of the prompt at token "
                f"{len(self._start) + same}, near {near!r}, so label positions would be wrong: "
                f"{self.template.advice()}"
            )

    def _text(self, text: str, where: str) -> str:
        """The text as it goes into prompts: checked, and shortened if need be."""
        if text not in self._texts:
            if not text.strip() and not self.allow_empty:
                raise PromptError(f"{where}: a text is empty; remove the row or give it a text")
            short, limit = text, self.max_text_tokens
            if limit is not None and len(self._encode(text)) > limit:
                short = self._shorten(text, limit)
                self.shortened += 1
            _keep(self._texts, text, short)
        return self._texts[text]

    def _shorten(self, text: str, limit: int) -> str:
        """The longest beginning of at most limit tokens, cut between words where that is near."""
        low, high = 1, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._encode(text[:middle])) <= limit:
                low = middle
            else:
                high = middle - 1
        cut = text[:low]
        if not text[low].isspace():
            words, space, _ = cut.rpartition(" ")
            if space and 2 * len(words) >= low:
                cut = words
        return cut.rstrip() or cut


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Remember a value; a stream of texts without end must not fill the memory."""
    if len(kept) >= KEPT:
        kept.clear()
    kept[key] = value


def _first_difference(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Where two sequences part; the length of the shorter one if it begins the other."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _start_tokens(tokenizer: Any) -> list[int]:
    """The special tokens, such as a BOS, that the tokenizer puts before a text."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    marked = list(tokenizer.encode("a", add_special_tokens=True))
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return marked[:start]
    return []
