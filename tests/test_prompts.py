"""Prompts as tokens: pieces equal the whole, positions are right, and what cannot be says why."""

from __future__ import annotations

import unicodedata
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import small_task
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import KINDS, Letters, gpt2, llama3, merging, qwen, tekken, words

from abft_mlx.data import LabelledTexts, demonstration_rows, training_rows
from abft_mlx.errors import DataError, PromptError
from abft_mlx.prompts import (
    LabelSpace,
    Prompt,
    PromptBuilder,
    Template,
    batches,
    builder,
    evaluation_prompts,
    label_space,
    pad,
    training_prompts,
)
from abft_mlx.recipe import PromptSection, TaskSection, TrainingSection
from abft_mlx.task import open_task

TEMPLATE = Template()
NAMES = ("positive", "negative")
SHOWN = [("the film was good", 0), (" the meal was dull ", 1), ("dull: music!", 1), ("good", 0)]
QUERY = "the music was lovely, and  stays"
# Of one token mostly; of several; one that begins the other; of bytes.
PAIRS = [NAMES, ("not spam", "good film"), ("good", "good film"), ("R\u00fcckerstattung", "café")]
# Characters that these have never seen are unknown to them.
WITHOUT_BYTES = ("words", "llama2")


def builder_for(tokenizer: Any, template: Template = TEMPLATE, **options: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer, template, label_space(tokenizer, template, NAMES), **options)


def letters(*pieces: str, template: Template = TEMPLATE, **options: Any) -> PromptBuilder:
    """A builder whose texts have a token for each character, with the labels A and B."""
    tokenizer = Letters(*pieces, " A", " B")
    space = label_space(tokenizer, template, ["A", "B"])
    return PromptBuilder(tokenizer, template, space, **options)


def covering(tokenizer: Any, text: str, start: int, end: int, **options: Any) -> list[int]:
    """Where the tokens are that hold a stretch of a text, by the tokenizer's own offsets."""
    offsets = tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
    return [i for i, (low, high) in enumerate(offsets) if low < end and start < high]


def made(n: int) -> LabelledTexts:
    texts = tuple(f"the {('film', 'meal')[i % 2]} was {i}" for i in range(n))
    return LabelledTexts(texts, tuple(i % 2 for i in range(n)), NAMES, "made.csv")


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole_text_and_labels_are_where_its_offsets_say(
    kind: str, names: tuple[str, str]
) -> None:
    tokenizer = KINDS[kind]()
    if names[0].startswith("R") and kind in WITHOUT_BYTES:
        with pytest.raises(PromptError, match="not in this model's vocabulary"):
            label_space(tokenizer, TEMPLATE, names)
        return
    space = label_space(tokenizer, TEMPLATE, names)
    text, stretches = "", []
    for shown, label in SHOWN:
        text += f"text: {shown} label: "
        stretches.append((len(text), len(text) + len(names[label])))
        text += f"{names[label]}\n"
    text += f"text: {QUERY} label:"
    # The tokenizer's own special tokens: a BOS where it adds one, and only there.
    whole = tokenizer.encode(text)
    for gold, word in enumerate(names):
        assembled = PromptBuilder(tokenizer, TEMPLATE, space)
        prompt = assembled.build(SHOWN, QUERY, gold)
        assert assembled.text(SHOWN, QUERY) == text
        assert list(prompt.token_ids) == whole
        assert (prompt.demonstration_labels, prompt.gold) == ((0, 1, 1, 0), gold)
        assert prompt.last == len(whole) - 1
        found = [covering(tokenizer, text, *stretch)[-1] for stretch in stretches]
        assert tuple(found) == prompt.label_positions
        # What a model that gives the right answer would say next; where more might follow in
        # another label, up to the line's end.
        answered = tokenizer.encode(f"{text} {word}")
        assert answered == [*whole, *space.token_ids[gold]]
        if word == "good":
            answered = tokenizer.encode(f"{text} {word}\ntext: x")[: len(answered) + 1]
        assert answered == [*whole, *prompt.target]


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=12), st.integers(0, 1)), min_size=1, max_size=4
    ),
    st.text(min_size=1, max_size=12),
)
def test_any_text_makes_a_prompt_equal_to_its_whole(
    shown: list[tuple[str, int]], query: str
) -> None:
    for kind in ("gpt2", "llama3", "qwen", "tekken", "gemma", "llama2-bytes", "unigram"):
        tokenizer = KINDS[kind]()
        assembled = builder_for(tokenizer, allow_empty=True)
        prompt = assembled.build(shown, query, 0)
        assert list(prompt.token_ids) == tokenizer.encode(assembled.text(shown, query))


@pytest.mark.parametrize(
    "template",
    [
        Template(instruction="Which? ", query_prefix="Now: "),
        Template(input_prefix="", label_prefix="="),
        Template(input_affix="\n", label_affix="\n\n"),
        Template(label_prefix=""),
    ],
)
def test_other_templates(template: Template) -> None:
    for tokenizer in (gpt2(), llama3()):
        assembled = builder_for(tokenizer, template)
        for shown in (SHOWN, SHOWN[:1], [], [(QUERY, 1)]):
            prompt = assembled.build(shown, QUERY, 0)
            assert list(prompt.token_ids) == tokenizer.encode(assembled.text(shown, QUERY))
            found = [prompt.token_ids[at] for at in prompt.label_positions]
            assert found == [assembled.space.first_ids[label] for _, label in shown]


def test_every_piece_comes_from_the_recipe() -> None:
    names = [field.name for field in fields(Template)]
    pieces = {name: str(number) for number, name in enumerate(names, 1)}
    template = Template.from_section(PromptSection(**pieces))
    assert template == Template(**pieces)
    assert template.render([("a", "b"), ("c", "d")], "e") == "12a34 b52c34 d562e34"
    assert template.pieces([], "e") == ["162e34"]


class _Marked(Letters):
    """Puts tokens of its own before a text, or behind it."""

    def __init__(self, before: str, after: str = "", pieces: tuple[str, ...] = ()) -> None:
        super().__init__(*pieces, " A", " B")
        self.before, self.after = before, after

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text)
        return [*map(ord, self.before), *ids, *map(ord, self.after)] if add_special_tokens else ids


@pytest.mark.parametrize(("before", "after"), [("", ""), ("^", "$"), ("^_", "$"), ("", "$")])
def test_a_prompt_starts_as_the_tokenizer_starts_a_text(before: str, after: str) -> None:
    tokenizer = _Marked(before, after)
    assembled = PromptBuilder(tokenizer, TEMPLATE, label_space(tokenizer, TEMPLATE, ["A", "B"]))
    prompt = assembled.build([("x", 0)], "y", 1)
    assert list(map(chr, prompt.token_ids[: len(before) + 1])) == [*before, "t"]
    assert assembled.start == (ord(before[0]) if before else None)
    assert prompt.label_positions == (len(before) + len("text: x label:"),)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: builder_for(merging()), "label_prefix 'label:' and the label word 'positive'"),
        (lambda: letters(" B;", template=Template(label_affix=";")), r"'B' in .* line break"),
        (lambda: letters(": B"), "the label word 'B' merge"),
        (lambda: letters(": A", template=Template(label_prefix="")), "input_affix 'text:'"),
        (lambda: letters(" A\n"), r"'A' in this model.*end the word in a letter"),
        # Only this label merges with what follows it; tails are encoded behind the other one.
        (lambda: letters(" B\ntext: s").build([("x", 1)], "six", 0), "at token 14, near 'l: B"),
        (lambda: letters().build([("x", 0)], " ", 0, where="prompt 7"), "^prompt 7: a text is"),
        (lambda: letters().text([("", 0)], "x"), "a text is empty; remove the row"),
        (lambda: letters(context_tokens=20).build([("four", 0)], "six", 0), "longest here has 4"),
        (lambda: label_space(gpt2(), TEMPLATE, ["a", "b"], {"a": "x", "b": " x"}), "same tokens"),
        (lambda: label_space(gpt2(), TEMPLATE, NAMES, {"negatve": "x"}), "did you mean 'negative'"),
        (lambda: label_space(gpt2(), TEMPLATE, NAMES, {"other": "x"}), "labels are positive, neg"),
        (lambda: label_space(gpt2(), TEMPLATE, NAMES, {"negative": " \t"}), "an empty word"),
        (lambda: label_space(words(), TEMPLATE, ["spam", "good zebra"]), "not in this model's voc"),
        (
            lambda: label_space(gpt2(), Template(label_affix=""), ["good", "good film"]),
            "'good' begins another label word",
        ),
        (
            lambda: label_space(llama3(), TEMPLATE, [f"c{n}" for n in range(703)], "letters"),
            "at most 702",
        ),
        (lambda: batches([prompt(5, 2), prompt(5, 3)], max_tokens=10), "different numbers of demo"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(call: Any, said: str) -> None:
    with pytest.raises(PromptError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_words_of_labels() -> None:
    space = label_space(llama3(), TEMPLATE, ["not spam", "spam"], {"not spam": " ham "})
    assert space == LabelSpace(("not spam", "spam"), ("ham", "spam"), space.token_ids)
    names = [f"class {'good' * n} it" for n in range(1, 31)]
    chosen = label_space(llama3(), TEMPLATE, names, "letters").words
    assert chosen == (*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB", "AC", "AD")
    assert label_space(llama3(), TEMPLATE, NAMES, "auto").words == NAMES
    # Words that only normalisation makes equal collide.
    twins = ["caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")]
    assert len(label_space(tekken(), TEMPLATE, twins)) == 2
    with pytest.raises(PromptError, match="same tokens"):
        label_space(qwen(), TEMPLATE, twins)


def test_auto_leaves_room_for_long_label_words() -> None:
    names = tuple(f"the class of {'good ' * 6}{n}" for n in range(12))
    prompt = {"demonstrations": "auto", "selection": "balanced"}
    section = TaskSection.model_validate(
        {"name": "long", "data": {"holdout": "stratified"}, "prompt": prompt}
    )
    task = open_task(section, small_task.texts(96, names), gpt2(), context_tokens=256)
    assert 1 < task.demonstrations < 12
    prompts = task.training_prompts(TrainingSection(examples=16))
    assert max(len(one.token_ids) for one in prompts) > 128


@pytest.mark.parametrize(
    ("text", "limit", "short"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdef", 5, "abcde"),
        # At a word's end nothing more is lost.
        ("abc def ghi", 7, "abc def"),
        # Inside a word: back to the one before, if at least half is left.
        ("abc defg", 6, "abc"),
        ("a b cdef", 5, "a b"),
        ("ab cdefgh", 5, "ab cd"),
        # Spaces at the end are left out, unless there is nothing else.
        ("abc  def", 5, "abc"),
        ("   abc", 2, "  "),
    ],
)
def test_a_long_text_is_cut_between_words_and_counted_once(
    text: str, limit: int, short: str
) -> None:
    assembled = letters(max_text_tokens=limit)
    assert assembled.text([], text) == f"text: {short} label:"
    plain = letters(allow_empty=True)
    assert assembled.build([(text, 0)], text, 1) == plain.build([(short, 0)], short, 1)
    assert assembled.shortened == int(short != text)


def test_tokens_are_kept_and_then_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    assembled, calls = letters(), []
    plain = assembled.tokenizer.encode
    assembled.tokenizer.encode = lambda text, **more: calls.append(text) or plain(text, **more)
    for _ in range(2):
        assembled.build([("one", 0), ("two", 1)], "six", 0)
    assert len(calls) == 3 + 2  # the pieces once, and each whole prompt to compare with
    monkeypatch.setattr(builder, "KEPT", 3)
    for n in range(9):
        assembled.build([(f"t{n}", 0)], f"q{n}", 0)
    assert len(assembled._tokens) <= 3 >= len(assembled._texts)


def prompt(length: int, k: int = 2, number: int = 1) -> Prompt:
    """A prompt whose tokens, labels and targets tell it apart by its number."""
    tokens = tuple(range(100 * number, 100 * number + length))
    targets = tuple(range(50, 50 + number))
    return Prompt(
        tokens, tuple(range(number % 3, number % 3 + k)), (number % 2,) * k, number, targets
    )


def test_a_batch_holds_int32_of_every_kind_behind_zeros() -> None:
    batch = pad([prompt(3, number=1), prompt(5, number=2)], [1, 0, 1], 6)
    assert {one.name: getattr(batch, one.name).tolist() for one in fields(batch)} == {
        "tokens": [[200, 201, 202, 203, 204, 0], [100, 101, 102, 0, 0, 0],
                   [200, 201, 202, 203, 204, 0]],
        "last": [4, 2, 4],
        "label_positions": [[2, 3], [1, 2], [2, 3]],
        "demonstration_labels": [[0, 0], [1, 1], [0, 0]],
        "gold": [2, 1, 2],
        "target": [[50, 51], [50, -1], [50, 51]],
        "rows": [1, 0, 1],
    }  # fmt: skip
    assert {getattr(batch, one.name).dtype for one in fields(batch)} == {np.dtype(np.int32)}
    halves = batch.halves()
    assert [len(half) for half in halves] == [1, 2]
    for one in fields(batch):
        parts = [getattr(half, one.name) for half in halves]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(batch, one.name))
    assert [part.tokens.tolist() for part in batch.of_one_length()] == [
        [[100, 101, 102]], [[200, 201, 202, 203, 204]] * 2,
    ]  # fmt: skip


@given(
    st.lists(st.integers(3, 90), min_size=1, max_size=40),
    st.integers(1, 300),
    st.sampled_from([1, 8, 32]),
    st.sampled_from([0, 32]),
)
def test_batches_hold_every_prompt_once_longest_first(
    lengths: list[int], max_tokens: int, bucket: int, cached: int
) -> None:
    prompts = [prompt(length) for length in lengths]
    cut = batches(prompts, max_tokens=max_tokens, bucket_tokens=bucket, cached_tokens=cached)
    assert sorted(row for batch in cut for row in batch.rows) == list(range(len(prompts)))
    for batch in cut:
        count, width = batch.tokens.shape
        assert width % bucket == 0
        assert count == 1 or count * (cached + width) <= max_tokens
        assert width - bucket < int(batch.last.max()) + 1 <= width
        for row, tokens, last in zip(batch.rows, batch.tokens, batch.last, strict=True):
            assert tuple(tokens[: last + 1]) == prompts[row].token_ids
            assert not tokens[last + 1 :].any()
    order = [(-len(prompts[row].token_ids), row) for batch in cut for row in batch.rows]
    assert order == sorted(order)


def test_training_prompts_take_the_last_row_as_query() -> None:
    texts, assembled = made(20), builder_for(gpt2())
    for together in (1, 2):
        prompts = training_prompts(assembled, texts, 6, 4, seed=3, together=together)
        drawn = training_rows(6, 20, 4, 3, together)
        for one, (*shown, query) in zip(prompts, drawn, strict=True):
            pairs = [texts.pairs()[row] for row in shown]
            assert one == assembled.build(pairs, *texts.pairs()[query])
    with pytest.raises(DataError, match=r"5 training rows are too few for 4 .* 2 queries"):
        training_prompts(assembled, made(5), 2, 4, together=2)


@pytest.mark.parametrize("fixed", [False, True])
def test_evaluation_prompts_run_repeat_after_repeat(fixed: bool) -> None:
    shown, asked, assembled = made(30), made(7), builder_for(gpt2())
    prompts = evaluation_prompts(assembled, shown, asked, 5, 3, 4, seed=7, fixed=fixed)
    drawn = demonstration_rows(5, 3, 30, 4, 7, fixed=fixed)
    for n, (one, rows) in enumerate(zip(prompts, drawn, strict=True)):
        pairs = [shown.pairs()[row] for row in rows]
        assert one == assembled.build(pairs, *asked.pairs()[n % 5])
    assert len(evaluation_prompts(assembled, shown, asked, 512, 2, 4)) == 14
    with pytest.raises(DataError, match="4 demonstration rows and 0 test rows"):
        evaluation_prompts(assembled, made(4), made(0), 2, 1, 2)


def test_a_prompt_that_cannot_be_is_named_by_its_number_and_rows() -> None:
    texts = LabelledTexts(("good", "bad", " "), (0, 1, 0), NAMES, "made.csv")
    with pytest.raises(PromptError, match=r"training prompt 0 \((row \d+(, )?)+\): a text is empt"):
        list(training_prompts(builder_for(gpt2()), texts, 1, 2))
    asked = LabelledTexts(("good", " "), (0, 1), NAMES, "made.csv")
    prompts = evaluation_prompts(builder_for(gpt2()), made(9), asked, 2, 2, 2)
    assert prompts[2].gold == 0  # built when it is asked for
    with pytest.raises(PromptError, match=r"^evaluation prompt 3 \(test row 1\): a text is empty"):
        prompts[3]
