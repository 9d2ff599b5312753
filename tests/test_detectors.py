"""The classic detectors: the rows they are run on, planted heads, and transformers' patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from abft_mlx import attention, loading
from abft_mlx.errors import UsageError
from abft_mlx.induction import detect, repeated_rows

VOCABULARY = np.arange(5, 95)


@pytest.mark.parametrize("start", [None, 2])
def test_rows_are_random_tokens_twice(start: int | None) -> None:
    tokens, last = repeated_rows(VOCABULARY, start, 40, 12, 7)
    lead = 0 if start is None else 1
    assert tokens.shape == (40, 24 + lead)
    assert tokens.dtype == last.dtype == np.int32
    halves = tokens[:, lead : lead + 12], tokens[:, lead + 12 :]
    np.testing.assert_array_equal(*halves)
    assert all(len(set(row)) == 12 for row in halves[0].tolist())
    assert set(halves[0].ravel()) <= set(VOCABULARY.tolist())
    assert start is None or (tokens[:, 0] == start).all()
    # Every position of the second half, and no other.
    assert set(last.tolist()) == set(range(lead + 12, lead + 24))
    again = repeated_rows(VOCABULARY, start, 40, 12, 7)
    np.testing.assert_array_equal(again[0], tokens)
    np.testing.assert_array_equal(again[1], last)
    assert (repeated_rows(VOCABULARY, start, 40, 12, 8)[0] != tokens).any()


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="12 tokens out of 11 cannot be drawn"):
        repeated_rows(np.arange(11), None, 4, 12, 0)
    with pytest.raises(UsageError, match="rows of 2 tokens"):
        repeated_rows(VOCABULARY, None, 4, 2, 0)


def planted(kind: str, tokens: list[int], last: int) -> int:
    """Where a textbook head looks, found by the tokens themselves."""
    if kind == "previous":
        return last - 1
    earlier = max(n for n in range(last) if tokens[n] == tokens[last])
    return earlier if kind == "duplicate" else earlier + 1


@pytest.mark.parametrize("start", [None, 3])
def test_planted_heads_are_told_apart(monkeypatch: Any, start: int | None) -> None:
    kinds = ("previous", "duplicate", "induction")

    def capture(_model: Any, tokens: np.ndarray, last: np.ndarray) -> list[mx.array | None]:
        rows = np.zeros((len(tokens), 4, tokens.shape[1]), dtype=np.float32)
        for b, (row, at) in enumerate(zip(tokens.tolist(), last.tolist(), strict=True)):
            for head, kind in enumerate(kinds):
                rows[b, head, planted(kind, row, at)] = 0.75
        return [None, mx.array(rows), mx.array(rows[:, :2])]

    monkeypatch.setattr(attention, "capture", capture)
    found = detect(None, VOCABULARY, start=start, sequences=37, repeated_tokens=20, seed=1)  # type: ignore[arg-type]
    assert (found.sequences, found.repeated_tokens) == (37, 20)
    tables = (found.previous_token, found.duplicate_token, found.induction)
    for number, table in enumerate(tables):
        assert table.shape == (3, 4)
        assert np.isnan(table[0]).all()
        assert np.isnan(table[2, 2:]).all()
        wanted = np.where(np.arange(4) == number, 0.75, 0)
        np.testing.assert_allclose(table[1], wanted)
        np.testing.assert_allclose(table[2, :2], wanted[:2])


def test_scores_equal_transformers_eager_attention(tmp_path: Path) -> None:
    torch = tiny_models.torch()
    reference = tiny_models.reference("llama")
    tiny_models.save_reference(reference, tmp_path, "llama")
    loaded = loading.load_model(str(tmp_path))
    N, rows, seed = 10, 24, 3
    found = detect(loaded.model, VOCABULARY, start=1, sequences=rows, repeated_tokens=N, seed=seed)
    tokens, last = repeated_rows(VOCABULARY, 1, rows, N, seed)
    with torch.no_grad():
        patterns = reference(torch.tensor(tokens).long(), output_attentions=True).attentions
    for layer, pattern in enumerate(patterns):
        full = pattern.double().numpy()
        for name, kind in (
            ("previous_token", "previous"),
            ("duplicate_token", "duplicate"),
            ("induction", "induction"),
        ):
            wanted = np.mean(
                [
                    full[b, :, at, planted(kind, tokens[b].tolist(), at)]
                    for b, at in enumerate(last.tolist())
                ],
                axis=0,
            )
            np.testing.assert_allclose(getattr(found, name)[layer], wanted, atol=1e-5)
            assert wanted.max() > 0.01
