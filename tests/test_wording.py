"""What templates and label words say, word for word, and the pieces that stand around a label."""

from __future__ import annotations

from typing import Any

import pytest
from made_tokenizers import Letters, gpt2, llama3, words
from test_prompts import TEMPLATE

from abft_mlx.errors import PromptError
from abft_mlx.prompts import Template, label_space
from abft_mlx.recipe import PromptSection

WAY_OUT = "map it to another word with prompt.label_words"
MERGE = (
    "merge in this model's vocabulary, so the label has no place of its own: end the prefix in a "
    "character that the vocabulary does not join to words (':', '=' or '>' perhaps)"
)


def refused(tokenizer: Any, names: list[str], words: Any = None, **pieces: str) -> str:
    with pytest.raises(PromptError) as caught:
        label_space(tokenizer, Template(**pieces), names, words)
    return str(caught.value)


def test_every_piece_comes_from_the_recipe() -> None:
    pieces = {
        "instruction": "1",
        "input_prefix": "2",
        "input_affix": "3",
        "label_prefix": "4",
        "label_affix": "5",
        "query_prefix": "6",
    }
    template = Template.from_section(PromptSection(**pieces))
    assert template == Template(**pieces)
    assert template.render([("a", "b"), ("c", "d")], "e") == "12a34 b52c34 d562e34"
    assert template.pieces(["a", "c"], "e") == ["12a34", "52c34", "562e34"]
    assert template.pieces([], "e") == ["162e34"]
    assert Template() == Template("", "text: ", " ", "label:", "\n", "")


@pytest.mark.parametrize(
    ("pieces", "anchor"),
    [
        ({}, "label:"),
        ({"label_prefix": ""}, "text:"),
        ({"label_prefix": "", "input_prefix": " "}, "x"),
    ],
)
def test_what_stands_before_a_label(pieces: dict[str, str], anchor: str) -> None:
    template = Template(**pieces)
    assert template.anchor == template.ending == anchor
    assert template.label("good") == " good"
    assert template.after_label == template.label_affix


def test_a_label_that_merges_names_the_setting() -> None:
    line = f"prompt.label_prefix 'label:' and the label word 'A' {MERGE}"
    assert refused(Letters(": A", " B"), ["A", "B"]) == line
    line = f"prompt.input_affix 'text:' and the label word 'A' {MERGE}"
    assert refused(Letters(": A", " B"), ["A", "B"], label_prefix="") == line
    assert refused(Letters(" A;", " A", " B"), ["A", "B"], label_affix=";") == (
        "prompt.label_affix ';' merges with the label word 'A' in this model's vocabulary: begin "
        "the affix with a line break"
    )
    # Each label is looked at, not the first alone.
    assert "the label word 'B' in" in refused(
        Letters(" B;", " A", " B"), ["A", "B"], label_affix=";"
    )
    assert "the label word 'B' merge" in refused(Letters(": B", " A"), ["A", "B"])


@pytest.mark.parametrize(
    ("pieces", "advice"),
    [
        ({"label_affix": ";"}, "begin prompt.label_affix (';') with a line break"),
        ({"label_affix": ""}, "begin prompt.label_affix ('') with a line break"),
        (
            {"label_affix": ";", "label_prefix": ""},
            "begin prompt.label_affix (';') with a line break",
        ),
        ({"label_prefix": ""}, "give prompt.label_prefix a word, such as 'label:'"),
        (
            {"label_affix": "\n\n", "label_prefix": "so"},
            r"end prompt.label_prefix ('so') in another character, or change prompt.label_affix "
            r"('\n\n')",
        ),
    ],
)
def test_advice_where_pieces_merge(pieces: dict[str, str], advice: str) -> None:
    assert Template(**pieces).advice() == advice


@pytest.mark.parametrize(
    ("names", "chosen", "line"),
    [
        (
            ["spam", "b", "c"],
            {"c": "spam", "b": "good"},
            f"label 'spam' and label 'c' (word 'spam') are the same tokens, ' spam': {WAY_OUT}",
        ),
        (
            ["spam", "ham"],
            {"hem": "good"},
            "prompt.label_words has 'hem', which is no label; did you mean 'ham'?",
        ),
        (
            ["spam", "ham"],
            {"other": "good"},
            "prompt.label_words has 'other', which is no label; labels are spam, ham",
        ),
        (
            ["spam", "ham"],
            {"ham": " \t"},
            "prompt.label_words has an empty word for label 'ham'; give one",
        ),
    ],
)
def test_labels_that_cannot_be_say_why_and_the_way_out(
    names: list[str], chosen: Any, line: str
) -> None:
    assert refused(gpt2(), names, chosen) == line


def test_unknown_words_say_why_and_the_way_out() -> None:
    line = f"is not in this model's vocabulary: {WAY_OUT}"
    assert refused(words(), ["spam", "zebra"]) == f"label 'zebra' {line}"
    assert refused(words(), ["spam", "ham"], {"ham": "zebra"}) == (
        f"label 'ham' (word 'zebra') {line}"
    )


def test_words_are_stripped() -> None:
    names = ["not spam", "spam", "good film"]
    chosen = {"not spam": " ham ", "good film": "good"}
    space = label_space(llama3(), TEMPLATE, names, chosen)
    assert space.words == ("ham", "spam", "good")
    assert len(space) == 3
