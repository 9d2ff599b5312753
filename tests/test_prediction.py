"""Predictions equal eval's probabilities and stock mlx-lm's, in order, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import made_chats
import mlx.core as mx
import numpy as np
import pytest
import tiny_task

from abft_mlx import data, evaluation, prediction, recipe
from abft_mlx.errors import DataError, PromptError
from abft_mlx.prediction import Predictor
from abft_mlx.prefix import Prefix
from abft_mlx.prompts import builder as builder_room
from abft_mlx.task import Task

TEXTS = [text.replace("film", "movie") for text in tiny_task.texts(40, seed=3).texts]


def queries(texts: list[str]) -> list[data.Query]:
    return [data.Query(text, f"line {number}") for number, text in enumerate(texts, 1)]


def predictor(task: Task, batch_tokens: int = 512, model: str = "llama") -> Predictor:
    shown = task.splits.demonstrations.pairs()[: task.demonstrations]
    return Predictor(tiny_task.model(model), task.builder, shown, batch_tokens)


def flat(lists: Iterator[list[prediction.Prediction]]) -> list[prediction.Prediction]:
    return [one for some in lists for one in some]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_equal_to_whole_prompts_of_stock_mlx_lm(model: str, batch_tokens: int) -> None:
    task = tiny_task.task()
    made = predictor(task, batch_tokens, model)
    found = flat(made.predict([queries(TEXTS)]))
    assert [one.text for one in found] == TEXTS
    stock = tiny_task.model(model)
    labels = mx.array(task.space.first_ids)
    for one in found:
        ids = task.tokenizer.encode(task.builder.text(made.demonstrations, one.text))
        expected = np.array(mx.softmax(stock(mx.array([ids]))[0, -1][labels]))
        np.testing.assert_allclose(list(one.probabilities.values()), expected, atol=1e-5)
        assert one.label == task.space.names[expected.argmax()]
        assert tuple(one.probabilities) == task.space.names


def test_the_prefix_reaches_into_the_query() -> None:
    task = tiny_task.task()
    made = predictor(task)
    one = task.builder.build(made.demonstrations, TEXTS[0], 0)
    text = task.tokenizer.decode(made.prefix.token_ids)
    assert one.token_ids[: len(made.prefix)] == made.prefix.token_ids
    # The last label, the line break and the query's input_prefix up to the text itself.
    assert len(made.prefix) > one.label_positions[-1] + 1
    assert text.endswith("\ntext:")


def test_turns_of_a_chat() -> None:
    tokenizer = made_chats.CHATS["chatml"].tokenizer()
    task = tiny_task.task("prompt.chat=true", "prompt.label_words=auto", tokenizer=tokenizer)
    model = tiny_task.model(vocab_size=len(tokenizer))
    made = Predictor(model, task.builder, task.splits.demonstrations.pairs()[:3], 512)
    found = flat(made.predict([queries(TEXTS[:6])]))
    asked = [task.builder.build(made.demonstrations, text, 0) for text in TEXTS[:6]]
    expected = evaluation.label_probabilities(model, asked, task.space, batch_tokens=512)
    for one, row in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(one.probabilities.values()), row, atol=1e-5)
    # The answer's end and the next user turn's beginning are shared.
    assert len(made.prefix) > asked[0].label_positions[-1] + 3


def test_a_prefix_that_was_too_long_is_shortened() -> None:
    """Where a first letter of the texts is always a token of its own, and then it is not."""
    task = tiny_task.task()
    made = predictor(task)
    kept = made.prefix.token_ids
    asked = task.builder.build(made.demonstrations, TEXTS[0], 0).token_ids
    made.prefix = Prefix(tiny_task.model(), asked[: len(kept) + 1])
    texts = [TEXTS[0], next(one for one in TEXTS if one[0] != TEXTS[0][0])]
    found = flat(made.predict([queries(texts[:1]), queries(texts)]))
    assert made.prefix.token_ids == kept
    fresh = flat(predictor(task).predict([queries(texts)]))
    for one, other in zip(found[1:], fresh, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_stream_without_end_is_answered_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_room, "KEPT", 16)
    task = tiny_task.task()
    made = predictor(task)
    taken: list[int] = []

    def endless() -> Iterator[list[data.Query]]:
        for number in itertools.count():
            taken.append(number)
            yield [data.Query(f"music number {number}", f"line {number}")]

    answers = made.predict(endless())
    for number in range(40):
        assert next(answers)[0].text == f"music number {number}"
        assert len(taken) == number + 1
    for kept in (task.builder._texts, task.builder._tails, task.builder._heads):
        assert len(kept) <= 16


def test_a_long_list_is_answered_in_parts() -> None:
    made = predictor(tiny_task.task(), batch_tokens=64)
    answers = made.predict([queries(TEXTS)])
    first = next(answers)
    assert 0 < len(first) < len(TEXTS)
    assert [one.text for one in [*first, *flat(answers)]] == TEXTS


def test_a_bad_text_comes_after_the_answers_before_it() -> None:
    made = predictor(tiny_task.task(context_tokens=120))
    asked = [*TEXTS[:3], "good bad " * 60, TEXTS[3]]
    answers = made.predict([queries(asked)])
    assert [one.text for one in next(answers)] == TEXTS[:3]
    with pytest.raises(PromptError, match=r"line 4 is \d+ tokens long and the model's context"):
        next(answers)


def test_long_texts_are_shortened_and_counted() -> None:
    made = predictor(tiny_task.task("prompt.max_text_tokens=4"))
    before = made.builder.shortened
    long = "music " + " ".join(["lovely"] * 30)
    (answer,) = flat(made.predict([queries([long])]))
    assert answer.text == long
    assert made.builder.shortened == before + 1


def test_demonstrations_that_make_no_prompt_are_refused() -> None:
    task = tiny_task.task(context_tokens=10)
    with pytest.raises(PromptError, match="a prompt of the demonstrations is"):
        predictor(task)


def test_given_demonstrations(tmp_path: object) -> None:
    path = tmp_path / "shown.csv"
    path.write_text("text,label\nthe roof burns,urgent\na chair stands,routine\n", encoding="utf-8")
    named = recipe.load("generated/urgency")
    opened = prediction.prepare(named, demonstrations=str(path))
    assert opened.shown() == [
        {"text": "the roof burns", "label": "urgent"},
        {"text": "a chair stands", "label": "routine"},
    ]
    assert opened.source == str(path)
    path.write_text("text,label\nthe roof burns,urgnt\na chair stands,routine\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"'urgnt' is not one of urgent, routine"):
        prediction.prepare(named, demonstrations=str(path))
