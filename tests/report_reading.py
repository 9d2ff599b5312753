"""What a report in a browser says of heads, read back and held against heads.npz."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from abft_mlx.induction import Heads

# Half a 255th of the largest value there can be, and half of the last digit that is shown.
TOKEN_POINTS = 100 / 510 + 0.051
LAST_DIGIT = 0.051


def shares(text: str) -> list[float]:
    """Percentages in a text."""
    return [float(one.replace("−", "-")) for one in re.findall(r"([−-]?\d+\.\d)%", text)]


def check_head(page: Any, heads: Heads, layer: int, head: int, example: int = 0) -> None:
    """Everything that the page says of one head on one prompt is what heads.npz says."""
    one = heads.examples[example]
    box = page.locator(f".example[data-example='{example}']")
    assert box.locator(".which").inner_text() == f"layer {layer}, head {head}"
    right = one.demonstration_labels == one.gold
    most = max(rows[layer, head].max() for rows in one.rows.values())
    for state, rows in one.rows.items():
        row = rows[layer, head].astype(np.float64)
        text = box.locator(f".tokens[data-state={state}]")
        told = shares(" ".join(text.locator(".token.label small").all_inner_texts()))
        np.testing.assert_allclose(told, 100 * row[one.label_positions], atol=TOKEN_POINTS)
        strength = text.locator(".token").evaluate_all(
            "spans => spans.map((span) => Number(span.style.getPropertyValue('--a')))"
        )
        np.testing.assert_allclose(strength, row / most, atol=1 / 510 + 0.001)
        darkness = text.locator(".token").evaluate_all(
            "spans => spans.map((span) => getComputedStyle(span).backgroundColor)"
        )
        lightness = [float(re.findall(r"[\d.]+", colour)[0]) for colour in darkness]
        order = np.argsort(strength)
        assert (np.diff(np.array(lightness)[order]) <= 1e-4).all(), "more attention is darker"
        assert max(lightness) > min(lightness)
        sums = {"right": row[one.label_positions[right]].sum(),
                "wrong": row[one.label_positions[~right]].sum()}  # fmt: skip
        sums["labels"] = sums["right"] + sums["wrong"]
        for key, value in sums.items():
            shown = box.locator(f"[data-row={key}] [data-state={state}]").inner_text()
            assert abs(shares(shown)[0] - 100 * value) <= LAST_DIGIT
