"""The pieces that stand around a label, and what is wrong with a template or a label word."""

from __future__ import annotations

from typing import Any

import pytest
from made_tokenizers import Letters, gpt2, llama3, words
from test_prompts import TEMPLATE

from abft_mlx.errors import PromptError
from abft_mlx.prompts import Template, label_space
from abft_mlx.recipe import PromptSection


def test_every_piece_comes_from_the_recipe() -> None:
    names = (
        "instruction", "input_prefix", "input_affix", "label_prefix", "label_affix", "query_prefix",
    )  # fmt: skip
    pieces = {name: str(number) for number, name in enumerate(names, 1)}
    template = Template.from_section(PromptSection(**pieces))
    assert template == Template(**pieces)
    assert template.render([("a", "b"), ("c", "d")], "e") == "12a34 b52c34 d562e34"
    assert template.pieces(["a", "c"], "e") == ["12a34", "52c34", "562e34"]
    assert template.pieces([], "e") == ["162e34"]
    assert Template.from_section(PromptSection()) == Template()


@pytest.mark.parametrize(
    ("tokenizer", "pieces", "names", "parts"),
    [
        (Letters(": A", " B"), {}, ["A", "B"], ["prompt.label_prefix 'label:'", "'A'"]),
        (Letters(": B", " A"), {}, ["A", "B"], ["prompt.label_prefix 'label:'", "'B'"]),
        (Letters(": A"), {"label_prefix": ""}, ["A", "B"], ["prompt.input_affix 'text:'"]),
        (Letters(" A;", " A", " B"), {"label_affix": ";"}, ["A", "B"], ["prompt.label_affix ';'"]),
        (words(), {}, ["spam", "zebra"], ["'zebra'", "not in this model's vocabulary"]),
    ],
)
def test_labels_that_merge_or_are_unknown_name_the_setting(
    tokenizer: Any, pieces: dict[str, str], names: list[str], parts: list[str]
) -> None:
    with pytest.raises(PromptError) as caught:
        label_space(tokenizer, Template(**pieces), names, None)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("names", "chosen", "parts"),
    [
        (["spam", "b", "c"], {"c": "spam", "b": "good"}, ["'spam'", "'c'", "same tokens"]),
        (["spam", "ham"], {"hem": "good"}, ["'hem'", "did you mean 'ham'?"]),
        (["spam", "ham"], {"ham": " \t"}, ["empty word", "'ham'"]),
    ],
)
def test_words_that_cannot_be(names: list[str], chosen: Any, parts: list[str]) -> None:
    with pytest.raises(PromptError, match=r"prompt\.label_words") as caught:
        label_space(gpt2(), Template(), names, chosen)
    assert all(part in str(caught.value) for part in parts)


def test_words_are_stripped() -> None:
    chosen = {"not spam": " ham ", "good film": "good"}
    space = label_space(llama3(), TEMPLATE, ["not spam", "spam", "good film"], chosen)
    assert (space.words, len(space)) == (("ham", "spam", "good"), 3)
