"""The builder's own rules: what is shortened and how, what is remembered, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from made_tokenizers import Letters, gpt2, llama3
from test_prompts import QUERY, SHOWN, builder_for

from abft_mlx.errors import PromptError
from abft_mlx.prompts import LabelSpace, PromptBuilder, Template, builder, label_space


def letters(*pieces: str, template: Template | None = None, **options: Any) -> PromptBuilder:
    """A builder whose texts have a token for each character, with the labels A and B."""
    tokenizer = Letters(*pieces, " A", " B")
    template = template or Template()
    return PromptBuilder(
        tokenizer, template, label_space(tokenizer, template, ["A", "B"]), **options
    )


@pytest.mark.parametrize(
    ("text", "limit", "short"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdef", 5, "abcde"),
        ("abcdef", 1, "a"),
        ("ab", 1, "a"),
        # At a word's end nothing more is lost.
        ("abc def", 3, "abc"),
        ("abc def ghi", 7, "abc def"),
        # Inside a word: back to the one before, if at least half is left.
        ("abc defg", 6, "abc"),
        ("abc defg", 7, "abc def"),
        ("a b cdef", 5, "a b"),
        ("ab cdefgh", 5, "ab cd"),
        ("abc\ndefg", 6, "abc\nde"),
        # Spaces at the end are left out, unless there is nothing else.
        ("abc  def", 5, "abc"),
        ("   abc", 2, "  "),
    ],
)
def test_a_long_text_is_cut_between_words(text: str, limit: int, short: str) -> None:
    made = letters(max_text_tokens=limit)
    assert made.text([], text) == f"text: {short} label:"
    assert made.shortened == int(short != text)
    plain = letters(allow_empty=True)
    assert made.build([(text, 0)], text, 1) == plain.build([(short, 0)], short, 1)


def test_what_was_encoded_is_kept_and_then_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "KEPT", 3)
    made = letters(max_text_tokens=2)
    for text in ("one", "two", "six", "one"):
        made.text([], text)
    assert made.shortened == 3
    # The fourth text makes room for itself: the others count again.
    for text in ("ten", "ten", "one"):
        made.text([], text)
    assert made.shortened == 5
    for n in range(9):
        made.build([(f"t{n}", 0)], f"q{n}", 0)
        kept = (made._texts, made._heads, made._tails)
        assert all(0 < len(one) <= 3 for one in kept)


def test_a_prompt_is_encoded_once_a_piece() -> None:
    made = letters()
    calls: list[str] = []
    plain = made.tokenizer.encode
    made.tokenizer.encode = lambda text, **options: calls.append(text) or plain(text, **options)
    for _ in range(2):
        made.build([("one", 0), ("two", 1)], "six", 0)
    whole = "text: one label: A\ntext: two label: B\ntext: six label:"
    assert calls == [
        "text: one label:",
        "label: A\ntext: two label:",
        "label: B\ntext: six label:",
        whole,
        whole,
    ]


@pytest.mark.parametrize("where", ["evaluation prompt 3", None])
def test_over_the_context_names_the_longest_text(where: str | None) -> None:
    named = {} if where is None else {"where": where}
    whole = len(letters().build([("four", 0), ("a text of 12", 1)], "six", 0).token_ids)
    assert letters(context_tokens=whole).build([("four", 0), ("a text of 12", 1)], "six", 0)
    for longest, shown, query in (
        (12, [("four", 0), ("a text of 12", 1)], "six"),
        (12, [("four", 0), ("six", 1)], "a text of 12"),
    ):
        with pytest.raises(PromptError) as caught:
            letters(context_tokens=whole - 1).build(shown, query, 0, **named)
        assert str(caught.value) == (
            f"{where or 'prompt'} is {whole} tokens long and the model's context is {whole - 1}: "
            "set prompt.max_text_tokens to shorten long texts (the longest here has "
            f"{longest} tokens), or lower prompt.demonstrations"
        )


def test_an_empty_text_is_refused_wherever_it_stands() -> None:
    line = "a text is empty; remove the row or give it a text"
    for shown, query in (([("", 0)], "x"), ([("x", 0)], "\n")):
        with pytest.raises(PromptError) as caught:
            letters().build(shown, query, 0)
        assert str(caught.value) == f"prompt: {line}"
        with pytest.raises(PromptError) as caught:
            letters().text(shown, query)
        assert str(caught.value) == f"prompt: {line}"
        assert letters(allow_empty=True).build(shown, query, 0)


MERGES = "this model's tokenizer merges across the pieces of the prompt at token"


def test_pieces_that_merge_say_where() -> None:
    # Only this label merges with what follows it; tails are encoded behind the other one.
    tail = " B\ntext: s"
    assert letters(tail).build([("x", 0)], "six", 0)
    for tokenizer, token in ((Letters(tail, " A", " B"), 14), (_Marked("^", pieces=(tail,)), 15)):
        space = label_space(tokenizer, Template(), ["A", "B"])
        with pytest.raises(PromptError) as caught:
            PromptBuilder(tokenizer, Template(), space).build([("x", 1)], "six", 0)
        assert str(caught.value) == (
            f"prompt: {MERGES} {token}, near {'l:' + tail + 'i'!r}, so label positions would be "
            "wrong: end prompt.label_prefix ('label:') in another character, or change "
            "prompt.label_affix ('\\n')"
        )


@pytest.mark.parametrize(
    ("affix", "advice"),
    [
        ("\n", "give prompt.label_prefix a word, such as 'label:'"),
        (";", "begin prompt.label_affix (';') with a line break"),
    ],
)
def test_a_prompt_that_merges_at_its_start(affix: str, advice: str) -> None:
    bare = Template(input_prefix="", input_affix="", label_prefix="", label_affix=affix)
    with pytest.raises(PromptError) as caught:
        letters("q B", template=bare).build([("q", 1)], "y", 0, where="training prompt 2")
    assert str(caught.value) == (
        f"training prompt 2: {MERGES} 0, near {'q B' + affix!r}, so label positions would be "
        f"wrong: {advice}"
    )


class _Marked(Letters):
    """Puts tokens of its own before a text, or behind it."""

    def __init__(self, before: str, after: str = "", pieces: tuple[str, ...] = ()) -> None:
        super().__init__(*pieces, " A", " B")
        self.before, self.after = before, after

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text)
        if not add_special_tokens:
            return ids
        return [*map(ord, self.before), *ids, *map(ord, self.after)]


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [
        (_Marked(""), []),
        (_Marked("^"), ["^"]),
        (_Marked("^", "$"), ["^"]),
        (_Marked("^_", "$"), ["^", "_"]),
        (_Marked("", "$"), []),
    ],
)
def test_a_prompt_starts_as_the_tokenizer_starts_a_text(tokenizer: Any, start: list[str]) -> None:
    made = PromptBuilder(tokenizer, Template(), label_space(tokenizer, Template(), ["A", "B"]))
    prompt = made.build([("x", 0)], "y", 1)
    assert list(map(chr, prompt.token_ids[: len(start) + 1])) == [*start, "t"]
    assert made.start == (ord(start[0]) if start else None)
    assert prompt.label_positions == (len(start) + len("text: x label:"),)


class _Otherwise(Letters):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode("?" if add_special_tokens else text)


def test_a_tokenizer_that_writes_texts_otherwise_has_no_start() -> None:
    tokenizer = _Otherwise(" A", " B")
    made = PromptBuilder(tokenizer, Template(), LabelSpace(("A",), ("A",), ((0x110000,),)))
    assert made.start is None


def test_start_of_the_families() -> None:
    assert builder_for(llama3()).start == llama3().bos_token_id
    assert builder_for(gpt2()).start is None


def test_texts_go_in_as_they_are_unless_a_limit_is_set() -> None:
    made = builder_for(gpt2())
    long = "the film was good, and lovely it stays! " * 40
    assert long in made.text([(long, 0)], QUERY)
    assert made.shortened == 0
    assert made.build([(long, 0)], QUERY, 0)
    assert made.build(SHOWN, QUERY, 0).gold == 0
