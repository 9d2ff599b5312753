"""Rows and logits of every architecture that transformers has, against its eager attention."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
import tiny_models

from abft_mlx import attention, ports
from abft_mlx.adapters import peft

ROWS = 1e-4
LOGITS = 1e-3


@pytest.fixture(scope="module")
def oracle(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    tiny_models.torch()
    return benchmark("transformers_oracle")


@pytest.mark.parametrize("name", ports.supported())
def test_rows_equal_transformers(
    oracle: ModuleType, benchmark: Callable[[str], ModuleType], name: str
) -> None:
    if name not in benchmark("tiny_configs").architectures():
        pytest.skip(f"the installed mlx-lm has no {name}")
    if oracle.why_not(name):
        assert name not in peft.SAME | peft.SAME_ATTENTION | set(peft.BEGINNINGS)
        pytest.skip(f"{name}: {oracle.why_not(name)}")
    found = oracle.compare(name)
    assert found["pattern"] <= ROWS
    assert found["logits"] <= LOGITS
    # Exports to PEFT call every layer what transformers calls it: the one with the same weight.
    assert not found["misnamed"]
    # Worth comparing: far from uniform.
    assert found["largest"] > 0.15


def test_the_comparison_notices_wrong_rows(oracle: ModuleType, monkeypatch: Any) -> None:
    """One position off, in one layer."""
    own = attention.capture

    def off(*given: Any) -> list[mx.array | None]:
        rows = own(*given)
        assert rows[1] is not None
        return [rows[0], mx.roll(rows[1], 1, axis=-1), *rows[2:]]

    monkeypatch.setattr(attention, "capture", off)
    assert oracle.compare("llama")["pattern"] > 10 * ROWS
