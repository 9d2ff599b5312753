"""Label words in the families of real tokenizers: what follows a label position in running text."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
import small_task
from made_tokenizers import KINDS, Letters, gpt2, llama3, qwen, tekken
from test_prompts import QUERY, SHOWN, TEMPLATE

from abft_mlx.errors import PromptError
from abft_mlx.prompts import PromptBuilder, Template, label_space
from abft_mlx.recipe import TaskSection, TrainingSection
from abft_mlx.task import open_task

# Of one token mostly; of several; one that begins the other; of bytes.
PAIRS = [
    ("positive", "negative"),
    ("not spam", "good film"),
    ("good", "good film"),
    ("R\u00fcckerstattung", "caf\u00e9"),
]


# Characters that these have never seen are unknown to them.
WITHOUT_BYTES = ("words", "llama2-first", "llama2-always", "llama2-legacy")


def covering(tokenizer: Any, text: str, start: int, end: int, **options: Any) -> list[int]:
    """Where the tokens are that hold a stretch of a text, by the tokenizer's own offsets."""
    offsets = tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
    return [i for i, (low, high) in enumerate(offsets) if low < end and start < high]


@pytest.mark.parametrize("words", PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_tokens_of_running_text(kind: str, words: tuple[str, str]) -> None:
    tokenizer = KINDS[kind]()
    if words[0].startswith("R") and kind in WITHOUT_BYTES:
        with pytest.raises(PromptError, match="not in this model's vocabulary"):
            label_space(tokenizer, TEMPLATE, words)
        return
    space = label_space(tokenizer, TEMPLATE, words)
    builder = PromptBuilder(tokenizer, TEMPLATE, space)
    text, stretches = "", []
    for shown, label in SHOWN:
        text += f"text: {shown} label: "
        stretches.append((len(text), len(text) + len(words[label])))
        text += f"{words[label]}\n"
    text += f"text: {QUERY} label:"
    whole = tokenizer.encode(text)
    for gold, word in enumerate(words):
        prompt = builder.build(SHOWN, QUERY, gold)
        assert list(prompt.token_ids) == whole
        found = [covering(tokenizer, text, *stretch) for stretch in stretches]
        assert tuple(places[-1] for places in found) == prompt.label_positions
        # What a model that gives the right answer would say next; where more might follow in
        # another label, up to the line's end.
        answered = tokenizer.encode(f"{text} {word}")
        assert answered == [*whole, *space.token_ids[gold]]
        if word == "good":
            line = tokenizer.encode(f"{text} {word}\ntext: x")
            answered = line[: len(answered) + 1]
        assert answered == [*whole, *prompt.target]


def test_a_label_that_begins_another_needs_an_end() -> None:
    with pytest.raises(PromptError, match="'good' begins another") as caught:
        label_space(gpt2(), Template(label_affix=""), ["good", "good film"])
    assert "label_affix" in str(caught.value)


def test_every_family_is_what_it_is_called() -> None:
    pieces = {
        kind: make().convert_ids_to_tokens(make().encode("a b\n7Zoé"))
        for kind, make in KINDS.items()
    }
    assert pieces["tekken"][:4] == ["<s>", "a", "Ġ", "b"]
    assert KINDS["tekken"]().convert_tokens_to_ids(["<unk>", "[/INST]", "<SPECIAL_99>", "!"]) == [
        0, 4, 99, 100,
    ]  # fmt: skip
    # A text begins with a space of its own in Llama 2 and in unigram models, and not in Gemma.
    assert pieces["llama2-bytes"][1].startswith("▁")
    assert pieces["unigram"][0].startswith("▁")
    assert pieces["gemma"][1] == "a"
    assert "<0x0A>" in pieces["llama2-bytes"]
    assert pieces["gemma"].count("\n") == 1
    composed, apart = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    assert qwen().encode(apart) == qwen().encode(composed)
    assert tekken().encode(apart) != tekken().encode(composed)
    # Upper case begins a piece in Tekken only.
    assert [piece for piece, _ in split(tekken(), "badFilm 123")] == [
        "bad",
        "Film",
        "Ġ",
        "1",
        "2",
        "3",
    ]
    assert [piece for piece, _ in split(llama3(), "badFilm 123")] == ["badFilm", "Ġ", "123"]
    assert [piece for piece, _ in split(qwen(), "badFilm 123")] == ["badFilm", "Ġ", "1", "2", "3"]


def split(tokenizer: Any, text: str) -> list[tuple[str, tuple[int, int]]]:
    return tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_words_are_refused_in_one_line(kind: str) -> None:
    with pytest.raises(PromptError, match="same tokens") as caught:
        label_space(KINDS[kind](), TEMPLATE, ["not spam", " not spam "])
    assert "\n" not in str(caught.value)
    assert "prompt.label_words" in str(caught.value)


def test_words_that_only_normalisation_makes_equal_collide() -> None:
    names = ["caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")]
    with pytest.raises(PromptError, match="same tokens, ' caf\u00e9'"):
        label_space(qwen(), TEMPLATE, names)
    assert len(label_space(tekken(), TEMPLATE, names)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_letters_stand_for_labels_on_request_alone(kind: str) -> None:
    names = [f"class {'good' * n} it" for n in range(1, 31)]
    letters = label_space(llama3(), TEMPLATE, names, "letters").words
    assert letters == (*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB", "AC", "AD")
    whole = ["not spam", "spam"]
    for asked in ("auto", None):
        assert label_space(KINDS[kind](), TEMPLATE, whole, asked).words == tuple(whole)
    with pytest.raises(PromptError, match="at most 702"):
        label_space(llama3(), TEMPLATE, [f"c{n}" for n in range(703)], "letters")


def test_auto_leaves_room_for_long_label_words() -> None:
    names = tuple(f"the class of {'good ' * 6}{n}" for n in range(12))
    section = TaskSection.model_validate(
        {
            "name": "long",
            "data": {"holdout": "stratified"},
            "prompt": {"demonstrations": "auto", "selection": "balanced"},
        }
    )
    task = open_task(section, small_task.texts(96, names), gpt2(), context_tokens=256)
    assert 1 < task.demonstrations < 12
    made = task.training_prompts(TrainingSection(examples=16))
    assert max(len(one.token_ids) for one in made) > 128


def test_a_word_that_ends_in_what_a_line_break_joins_is_refused() -> None:
    # Llama 3 and Qwen split punctuation together with the line breaks behind it.
    with pytest.raises(PromptError, match="'spam!!' in this model") as caught:
        label_space(_JoiningBreaks("!!\n"), TEMPLATE, ["ham", "spam!!"])
    assert "end the word in a letter" in str(caught.value)


class _JoiningBreaks(Letters):
    unk_token_id = None
