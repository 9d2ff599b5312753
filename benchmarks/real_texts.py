"""The paper's texts for the real-text base: no test rows, and no labels of calibration rows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from abft_mlx import data, recipe
from abft_mlx.analysis.paper import Paper

SETS = tuple(Paper().facts["tasks"])
# Sets whose labels say the same about the same sentences: leaving one out leaves out its kin.
KIN = {
    "sst2": ("rotten_tomatoes", "sst5"),
    "sst5": ("rotten_tomatoes", "sst2"),
    "rotten_tomatoes": ("sst2", "sst5"),
    "subjective": ("rotten_tomatoes",),
}


def fold(text: str) -> str:
    """A text without case and punctuation."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


@dataclass
class Real:
    """One data set without the texts of any test part.

    Attributes:
        name: of the shipped recipe.
        texts: stripped, at most 1024 characters.
        labels: class of each text.
        words: the label words of the paper.
        opener: what stands before a text, without its colon.
        asker: what asks for the label, without its colon.
        shown: rows whose labels may be shown: none of a calibration part, of any set.
    """

    name: str
    texts: list[str]
    labels: list[int]
    words: tuple[str, ...]
    opener: str
    asker: str
    shown: list[int]
    tokens: list[np.ndarray] = field(default_factory=list)


def read(folder: Path, log) -> list[Real]:
    """All sets, without test rows and without texts that fold to the same as a test text."""
    opened = []
    for name in SETS:
        chosen = recipe.load(
            name,
            [
                f"data.source={json.dumps(str(folder / f'{name}.jsonl'))}",
                "data.text=text",
                "data.label=label",
            ],
        )
        texts = data.load(chosen.data)
        opened.append((name, chosen, texts, data.split(texts, chosen.data)))
    forbidden = {fold(text) for _, _, _, splits in opened for text in splits.test.texts}
    training = {fold(text) for _, _, _, splits in opened for text in splits.training.texts}
    result = []
    for name, chosen, texts, splits in opened:
        test = set(splits.rows["test"])
        rows = [row for row in range(len(texts)) if row not in test and fold(texts.texts[row])]
        kept = [row for row in rows if fold(texts.texts[row]) not in forbidden]
        shown = [i for i, row in enumerate(kept) if fold(texts.texts[row]) not in training]
        log(
            f"{name}: {len(texts)} rows, {len(test)} of the test part left out, "
            f"{len(rows) - len(kept)} more because they equal a test text of some set; "
            f"labels of {len(shown)} rows may be shown"
        )
        result.append(
            Real(
                name,
                [" ".join(texts.texts[row].split()) for row in kept],
                [texts.labels[row] for row in kept],
                texts.names,
                chosen.prompt.input_prefix.strip(" :"),
                chosen.prompt.label_prefix.strip(" :"),
                shown,
            )
        )
    return result


def class_odds(sets: list[Real], size: int) -> np.ndarray:
    """How much more often each token occurs in each class than in its set's others, (V, topics).

    Log odds from the rows whose labels may be shown, add-one smoothed and at most 3 either way;
    topics number the classes of all sets in order.
    """
    columns = []
    for one in sets:
        counts = np.zeros((len(one.words), size))
        for row in one.shown:
            counts[one.labels[row], np.unique(one.tokens[row])] += 1
        total = counts.sum(axis=0)
        documents = np.bincount([one.labels[row] for row in one.shown], minlength=len(counts))
        for c, count in enumerate(counts):
            inside = (count + 1) / (documents[c] + 2)
            outside = (total - count + 1) / (documents.sum() - documents[c] + 2)
            columns.append(np.where(total > 0, np.log(inside / outside), 0.0))
    return np.clip(np.stack(columns, axis=1), -3, 3).astype(np.float32)
