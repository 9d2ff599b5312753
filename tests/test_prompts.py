"""Prompts as tokens: pieces equal the whole, positions are right, and what cannot be says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import (
    KINDS,
    Letters,
    gemma,
    gpt2,
    llama2_bytes,
    llama3,
    merging,
    qwen,
    tekken,
    unigram,
    words,
)

from abft_mlx.data import LabelledTexts, demonstration_rows, training_rows
from abft_mlx.errors import DataError, PromptError
from abft_mlx.prompts import (
    LabelSpace,
    Prompt,
    PromptBuilder,
    Template,
    batches,
    evaluation_prompts,
    label_space,
    training_prompts,
)
from abft_mlx.recipe import PromptSection

TEMPLATE = Template()
SHOWN = [("the film was good", 0), (" the meal was dull ", 1), ("dull: music!", 1), ("good", 0)]
QUERY = "the music was lovely, and  stays"


def builder_for(tokenizer: Any, template: Template = TEMPLATE, **options: Any) -> PromptBuilder:
    space = label_space(tokenizer, template, ["positive", "negative"])
    return PromptBuilder(tokenizer, template, space, **options)


def made(n: int) -> LabelledTexts:
    texts = tuple(
        f"the {word} was {i}" for i, word in zip(range(n), ["film", "meal"] * n, strict=False)
    )
    return LabelledTexts(
        texts, tuple(i % 2 for i in range(n)), ("positive", "negative"), "made.csv"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole_and_positions_hold_the_labels(kind: str) -> None:
    tokenizer = KINDS[kind]()
    builder = builder_for(tokenizer)
    prompt = builder.build(SHOWN, QUERY, 1)
    text = (
        "text: the film was good label: positive\ntext:  the meal was dull  label: negative\n"
        "text: dull: music! label: negative\ntext: good label: positive\n"
        "text: the music was lovely, and  stays label:"
    )
    assert builder.text(SHOWN, QUERY) == text
    # The tokenizer's own special tokens: a BOS where it adds one, and only there.
    assert list(prompt.token_ids) == tokenizer.encode(text)
    assert prompt.demonstration_labels == (0, 1, 1, 0)
    assert prompt.gold == 1
    assert prompt.last == len(prompt.token_ids) - 1
    for position, label in zip(prompt.label_positions, prompt.demonstration_labels, strict=True):
        assert prompt.token_ids[position] == builder.space.first_ids[label]
        before = tokenizer.decode(prompt.token_ids[:position])
        assert before.endswith("label:") or kind == "words"
    assert tokenizer.decode(prompt.token_ids[: prompt.label_positions[0] + 1]).endswith("positive")


def test_bos_stands_once_where_the_tokenizer_adds_one() -> None:
    for tokenizer, count in ((llama3(), 1), (gpt2(), 0)):
        prompt = builder_for(tokenizer).build(SHOWN, QUERY, 0)
        assert prompt.token_ids.count(tokenizer.bos_token_id) == count
        assert (prompt.token_ids[0] == tokenizer.bos_token_id) == bool(count)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=12), st.integers(0, 1)), min_size=1, max_size=4
    ),
    st.text(min_size=1, max_size=12),
)
def test_any_text_makes_a_prompt_equal_to_its_whole(
    shown: list[tuple[str, int]], query: str
) -> None:
    for make in (gpt2, llama3, qwen, tekken, gemma, llama2_bytes, unigram):
        tokenizer = make()
        builder = builder_for(tokenizer, allow_empty=True)
        prompt = builder.build(shown, query, 0)
        assert list(prompt.token_ids) == tokenizer.encode(builder.text(shown, query))


@pytest.mark.parametrize(
    "template",
    [
        Template(instruction="Which? ", query_prefix="Now: "),
        Template(input_prefix="", label_prefix="="),
        Template(input_affix="\n", label_affix="\n\n"),
        Template(label_affix="\t"),
        Template(label_prefix=""),
    ],
)
def test_other_templates(template: Template) -> None:
    for tokenizer in (gpt2(), llama3()):
        builder = builder_for(tokenizer, template)
        for shown in (SHOWN, SHOWN[:1], []):
            prompt = builder.build(shown, QUERY, 0)
            assert list(prompt.token_ids) == tokenizer.encode(builder.text(shown, QUERY))
            found = [prompt.token_ids[at] for at in prompt.label_positions]
            assert found == [builder.space.first_ids[label] for _, label in shown]


def test_the_same_text_as_query_and_as_demonstration() -> None:
    template = Template(instruction="Which? ", query_prefix="Now: ")
    builder = builder_for(gpt2(), template)
    for shown in ([], [("good", 0)], [("good", 0), ("good", 1)], []):
        prompt = builder.build(shown, "good", 0)
        assert list(prompt.token_ids) == gpt2().encode(builder.text(shown, "good"))


def test_template_comes_from_the_recipe() -> None:
    section = PromptSection(instruction="a", input_prefix="b", input_affix="c", query_prefix="f")
    assert Template.from_section(section) == Template("a", "b", "c", "label:", "\n", "f")


def test_merging_across_pieces_is_refused_with_the_piece_named() -> None:
    with pytest.raises(
        PromptError, match="label_prefix 'label:' and the label word 'positive' merge"
    ):
        builder_for(merging())
    with pytest.raises(PromptError, match="label_affix 'ly' merges with the label word 'A'"):
        label_space(Letters(" Aly", " A", " B"), Template(label_affix="ly"), ["A", "B"])
    tokenizer = Letters(" A;text", " A", " B")
    template = Template(label_affix=";")
    builder = PromptBuilder(tokenizer, template, label_space(tokenizer, template, ["A", "B"]))
    with pytest.raises(PromptError) as caught:
        builder.build([("x", 1), ("y", 0)], "z", 0, where="training prompt 3")
    assert str(caught.value).startswith("training prompt 3: this model's tokenizer merges across")
    assert "begin prompt.label_affix (';') with a line break" in str(caught.value)


def test_empty_text_names_the_prompt() -> None:
    builder = builder_for(gpt2())
    with pytest.raises(PromptError, match="evaluation prompt 7: a text is empty; remove the row"):
        builder.build(SHOWN, "  ", 0, where="evaluation prompt 7")
    assert builder_for(gpt2(), allow_empty=True).build(SHOWN, "", 0)


def test_prompt_over_the_context_says_what_to_do() -> None:
    whole = len(builder_for(gpt2()).build(SHOWN, QUERY, 0).token_ids)
    assert builder_for(gpt2(), context_tokens=whole).build(SHOWN, QUERY, 0)
    with pytest.raises(PromptError) as caught:
        builder_for(gpt2(), context_tokens=whole - 1).build(SHOWN, QUERY, 0, where="prompt 5")
    message = str(caught.value)
    assert message.startswith(
        f"prompt 5 is {whole} tokens long and the model's context is {whole - 1}"
    )
    assert "prompt.max_text_tokens" in message
    assert "lower prompt.demonstrations" in message


def test_long_texts_are_shortened_between_words_and_counted_once() -> None:
    builder = builder_for(gpt2(), max_text_tokens=8)
    long = "the film was good, and lovely it stays! " * 9
    text = builder.text([(long, 0), (long, 1), ("good", 0)], long)
    assert builder.shortened == 1
    short = text.partition(" label:")[0].removeprefix("text: ")
    assert long.startswith(short)
    assert not short.endswith(" ")
    assert long[len(short)] == " "
    assert 4 <= len(gpt2().encode(short)) <= 8
    assert "text: good label: positive" in text
    wordless = builder_for(gpt2(), max_text_tokens=5).text([], "x" * 50)
    assert wordless.startswith("text: xxx")
    assert len(wordless) < 40


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_found_in_their_place(kind: str) -> None:
    space = label_space(KINDS[kind](), TEMPLATE, ["positive", "negative"])
    assert space.words == space.names == ("positive", "negative")


def test_unknown_words_are_no_labels() -> None:
    for name in ("zebra", "good zebra"):
        with pytest.raises(PromptError, match=f"label '{name}' is not in this model's vocabulary"):
            label_space(words(), TEMPLATE, [name, "spam"])


def test_a_map_may_leave_labels_as_they_are() -> None:
    space = label_space(gpt2(), TEMPLATE, ["not spam", "spam"], {"not spam": "ham"})
    assert space == LabelSpace(("not spam", "spam"), ("ham", "spam"), space.token_ids)


def prompt(length: int, k: int = 2) -> Prompt:
    return Prompt(tuple(range(1, length + 1)), tuple(range(k)), (1,) * k, length % 2, (3,))


@given(
    st.lists(st.integers(3, 90), min_size=1, max_size=40),
    st.integers(1, 300),
    st.sampled_from([1, 8, 32]),
    st.sampled_from([None, 1, 3]),
)
def test_batches_hold_every_prompt_once(
    lengths: list[int], max_tokens: int, bucket: int, most: int | None
) -> None:
    prompts = [prompt(length) for length in lengths]
    made = batches(prompts, max_tokens=max_tokens, bucket_tokens=bucket, max_prompts=most)
    assert sorted(row for batch in made for row in batch.rows) == list(range(len(prompts)))
    for batch in made:
        count, width = batch.tokens.shape
        assert width % bucket == 0
        assert count == 1 or count * width <= max_tokens
        assert most is None or count <= most
        assert width - bucket < int(batch.last.max()) + 1 <= width
        for i, row in enumerate(batch.rows):
            one = prompts[row]
            assert tuple(batch.tokens[i, : batch.last[i] + 1]) == one.token_ids
            assert not batch.tokens[i, batch.last[i] + 1 :].any()
            assert tuple(batch.label_positions[i]) == one.label_positions
            assert tuple(batch.demonstration_labels[i]) == one.demonstration_labels
            assert batch.gold[i] == one.gold
        for array in (batch.tokens, batch.last, batch.label_positions, batch.gold, batch.rows):
            assert array.dtype == np.int32
    widths = [batch.tokens.shape[1] for batch in made]
    assert widths == sorted(widths, reverse=True)


def test_batches_of_nothing_and_of_unlike_prompts() -> None:
    assert batches([], max_tokens=10) == []
    assert batches([prompt(5, k=0)], max_tokens=10)[0].label_positions.shape == (1, 0)
    with pytest.raises(PromptError, match="different numbers of demonstrations"):
        batches([prompt(5, 2), prompt(5, 3)], max_tokens=10)


def test_training_prompts_take_the_last_row_as_query() -> None:
    texts, builder = made(20), builder_for(gpt2())
    prompts = training_prompts(builder, texts, 6, 4, seed=3)
    for one, rows in zip(prompts, training_rows(6, 20, 4, seed=3), strict=True):
        pairs = [texts.pairs()[row] for row in rows]
        assert one == builder.build(pairs[:4], *pairs[4])
    assert prompts[:3] == list(training_prompts(builder_for(gpt2()), texts, 3, 4, seed=3))
    assert prompts != training_prompts(builder, texts, 6, 4, seed=4)


def test_evaluation_prompts_run_repeat_after_repeat() -> None:
    shown, asked, builder = made(30), made(7), builder_for(gpt2())
    prompts = evaluation_prompts(builder, shown, asked, 5, 3, 4, seed=7)
    sampler = demonstration_rows(5, 3, 30, 4, seed=7)
    assert len(prompts) == 15
    for repeat in range(3):
        for query in range(5):
            pairs = [shown.pairs()[row] for row in sampler[query + 5 * repeat]]
            assert prompts[query + 5 * repeat] == builder.build(pairs, *asked.pairs()[query])
    assert len(evaluation_prompts(builder, shown, asked, 512, 2, 4)) == 14


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda b: training_prompts(b, made(4), 2, 4),
            "4 training rows are too few for 4 demonstr",
        ),
        (
            lambda b: evaluation_prompts(b, made(4), made(0), 2, 1, 4),
            "4 demonstration rows and 0 test",
        ),
    ],
)
def test_too_few_rows(call: Callable[[PromptBuilder], Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        call(builder_for(gpt2()))


def test_errors_name_the_prompt_and_its_rows() -> None:
    texts = LabelledTexts(("good", "bad", " "), (0, 1, 0), ("positive", "negative"), "made.csv")
    with pytest.raises(
        PromptError, match=r"training prompt 0 \((row \d+(, )?)+\): a text is empty"
    ):
        list(training_prompts(builder_for(gpt2()), texts, 1, 2))
    with pytest.raises(PromptError, match=r"evaluation prompt 0 \(test row 0\): a text is empty"):
        list(evaluation_prompts(builder_for(gpt2()), texts, texts.subset([0]), 1, 1, 3))
