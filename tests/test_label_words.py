"""Label words in the families of real tokenizers: what follows a label position in running text."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from made_tokenizers import KINDS, gemma, llama2_bytes, llama3, qwen, tekken, unigram
from test_prompts import QUERY, SHOWN, TEMPLATE, builder_for

from abft_mlx.errors import PromptError
from abft_mlx.prompts import label_space

WORDS = ("positive", "negative")


def covering(tokenizer: Any, text: str, start: int, end: int, **options: Any) -> list[int]:
    """Where the tokens are that hold a stretch of a text, by the tokenizer's own offsets."""
    offsets = tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
    return [i for i, (low, high) in enumerate(offsets) if low < end and start < high]


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_is_the_token_that_follows_in_running_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    text, stretches = "", []
    for shown, label in SHOWN:
        text += f"text: {shown} label: "
        stretches.append((len(text), len(text) + len(WORDS[label])))
        text += f"{WORDS[label]}\n"
    text += f"text: {QUERY} label:"
    whole = tokenizer.encode(text)
    for gold, word in enumerate(WORDS):
        prompt = builder_for(tokenizer).build(SHOWN, QUERY, gold)
        assert list(prompt.token_ids) == whole
        found = [covering(tokenizer, text, *stretch) for stretch in stretches]
        assert found == [[position] for position in prompt.label_positions]
        # What a model that gives the right answer would say next.
        assert tokenizer.encode(f"{text} {word}") == [*whole, prompt.target]


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
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["spam", "not spam"], "label 'not spam' is 2 tokens"),
        (["spam", "snow\u2603"], "label 'snow\u2603' is "),
        (["spam", " spam "], "share the token"),
    ],
)
def test_words_that_cannot_be_are_refused_in_one_line(
    kind: str, names: list[str], said: str
) -> None:
    if kind == "words" and "\u2603" in names[1]:
        said = "is not in this model's vocabulary"
    with pytest.raises(PromptError) as caught:
        label_space(KINDS[kind](), TEMPLATE, names)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "prompt.label_words" in str(caught.value)


def test_words_that_only_normalisation_makes_equal_collide() -> None:
    names = ["caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")]
    with pytest.raises(PromptError, match="share the token ' caf\u00e9'"):
        label_space(qwen(), TEMPLATE, names)
    with pytest.raises(PromptError, match=f"label '{names[1]}' is . tokens"):
        label_space(tekken(), TEMPLATE, names)


@pytest.mark.parametrize("make", [tekken, qwen, gemma, llama2_bytes, unigram])
def test_auto_finds_words_in_every_family(make: Any) -> None:
    # Both begin with the same token, so letters are left.
    space = label_space(make(), TEMPLATE, ["good film", "good meal"], "auto")
    assert space.words == ("A", "B")
    assert label_space(make(), TEMPLATE, ["not spam", "spam"], "auto").words == ("not", "spam")
