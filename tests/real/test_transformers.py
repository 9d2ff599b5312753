"""SmolLM2's attention rows and label probabilities, against transformers' eager attention."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import abft_mlx
from abft_mlx import attention

pytestmark = pytest.mark.real

SHOWN = [
    ("Who painted the ceiling of the Sistine Chapel?", "person"),
    ("In which city is the Brandenburg Gate?", "location"),
    ("How many strings does a cello have?", "numeric value"),
    ("What does the E in UNESCO stand for?", "abbreviation"),
    ("Which river flows through Vienna?", "location"),
    ("Who was the first woman in space?", "person"),
    ("What does RSVP mean?", "abbreviation"),
    ("What year did the Titanic sink?", "numeric value"),
]
ASKED = [
    "How far is the moon from the earth?",
    "Where was Marie Curie born?",
    "Who wrote the music of the Nutcracker?",
    "What is the full form of NATO?",
    "At what temperature does lead melt?",
    "What mountain is the highest in Africa?",
    "Who, in the end, killed the dragon that guarded the gold of the Nibelungs?",
    "What does a DJ do with the letters of his job?",
    "How long is a fortnight?",
    "Which country has the most islands — Sweden, Norway or Finland?",
    "What general did Cleopatra marry?",
    "AC/DC stands for what?",
]
LABELS = sorted({label for _, label in SHOWN})


def prompt(query: str) -> str:
    """The default prompt of a user's own data, spelled out."""
    shown = "".join(f"text: {text} label: {label}\n" for text, label in SHOWN)
    return f"{shown}text: {query} label:"


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> tuple[Any, Any]:
    """The tokenizer and the model, as transformers loads them."""
    import torch
    import transformers

    torch.set_num_threads(1)  # its threads wait for each other in busy loops, forever beside others
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            transformers.AutoTokenizer.from_pretrained(smollm2),
            transformers.AutoModelForCausalLM.from_pretrained(
                smollm2, attn_implementation="eager", dtype=torch.float32
            ).eval(),
        )


def test_attention_rows(smollm2: Path, oracle: tuple[Any, Any]) -> None:
    import torch

    tokenizer, theirs = oracle
    model, _ = abft_mlx.load(str(smollm2))
    encoded = [tokenizer(prompt(query))["input_ids"] for query in ASKED]
    last = [len(ids) - 1 for ids in encoded]
    tokens = np.zeros((len(ASKED), max(last) + 1), dtype=np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    rows = attention.capture(model, tokens, last)
    mx.eval(rows)
    assert len(rows) == 30
    largest = 0.0
    for number, ids in enumerate(encoded):
        with torch.no_grad():
            outputs = theirs(torch.tensor([ids]), output_attentions=True, use_cache=False)
        for layer, pattern in zip(rows, outputs.attentions, strict=True):
            assert layer is not None
            found = np.array(layer[number, :, : len(ids)])
            expected = pattern[0, :, -1].numpy()
            np.testing.assert_allclose(found, expected, atol=1e-4)
            largest = max(largest, float(expected[:, 1:].max()))
    assert largest > 0.5  # attention that is far from uniform, and not on the first token alone


def test_label_probabilities(smollm2: Path, oracle: tuple[Any, Any]) -> None:
    import torch

    tokenizer, theirs = oracle
    classifier = abft_mlx.Classifier(str(smollm2), demonstrations=SHOWN)
    assert classifier.classes_.tolist() == LABELS
    asked = ASKED[::2]
    found = classifier.predict_proba(asked)
    expected = np.zeros_like(found)
    for row, query in enumerate(asked):
        start = tokenizer(prompt(query))["input_ids"]
        whole = [tokenizer(f"{prompt(query)} {label}")["input_ids"] for label in LABELS]
        longest = max(map(len, whole))
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in whole])
        with torch.no_grad():
            chances = torch.log_softmax(theirs(padded, use_cache=False).logits, dim=-1)
        for column, ids in enumerate(whole):
            assert ids[: len(start)] == start
            for at in range(len(start), len(ids)):
                expected[row, column] += float(chances[column, at - 1, ids[at]])
    expected = np.exp(expected - expected.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(set(found.argmax(axis=1))) > 1
