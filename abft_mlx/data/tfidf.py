"""TF-IDF vectors of words, by scikit-learn's usual formula, without scikit-learn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Words of two characters or more, as scikit-learn's TfidfVectorizer finds them.
_WORD = re.compile(r"\b\w\w+\b")


@dataclass(frozen=True)
class Vectors:
    """N sparse vectors of length 1 over V words (of length 0 where no word is known).

    Attributes:
        rows: (n,) int64, ascending: the vector of each entry that is not zero.
        columns: (n,) int64, its word.
        values: (n,) float64.
        shape: N and V.
    """

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]


class TfIdf:
    """The words of some texts, with their weight ln((1 + N) / (1 + n)) + 1, n texts having one.

    Args:
        texts: N texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        words = [set(_words(text)) for text in texts]
        found = Counter(word for some in words for word in some)
        self._columns = {word: column for column, word in enumerate(sorted(found))}
        having = np.array([found[word] for word in self._columns], dtype=np.float64)
        self._weights = np.log((1 + len(texts)) / (1 + having)) + 1

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Word counts times weights, each vector divided by its Euclidean length.

        Args:
            texts: N texts; words that the texts of the constructor lack are left out.
        """
        entries = [
            (row, self._columns[word], count)
            for row, text in enumerate(texts)
            for word, count in Counter(_words(text)).items()
            if word in self._columns
        ]
        table = np.array(entries, dtype=np.int64).reshape(-1, 3)
        rows, columns = table[:, 0], table[:, 1]
        values = table[:, 2] * self._weights[columns]
        lengths = np.sqrt(np.bincount(rows, values**2, len(texts)))
        return Vectors(rows, columns, values / lengths[rows], (len(texts), len(self._columns)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
