"""Attention rows small enough for a page: bytes, a scale for each head, deflated."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np

LEVELS = 255


@dataclass(frozen=True)
class Packed:
    """The rows of one prompt in one state.

    Attributes:
        rows: (L, H, T) uint8; attention is a row's byte times its head's scale.
        scales: (L, H) float64, a 255th of the head's largest value; NaN for layers without heads.
    """

    rows: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> Packed:
        """Pack attention.

        Args:
            rows: (L, H, T) float, NaN for layers without heads.
        """
        wide = rows.astype(np.float64)
        # Not nanmax, which warns of layers that are NaN throughout.
        largest = np.where(np.isnan(wide), -np.inf, wide).max(axis=-1)
        scales = np.where(np.isfinite(largest), largest / LEVELS, np.nan)
        # As the page will read it, so that what is drawn here and there is the same.
        scales = np.round(scales, 9)
        divisor = np.where(scales > 0, scales, 1.0)[..., None]
        levels = np.where(np.isnan(wide), 0.0, wide) / divisor
        return cls(np.clip(np.rint(levels), 0, LEVELS).astype(np.uint8), scales)

    def head(self, layer: int, head: int) -> np.ndarray:
        """(T,) attention of one head, as the page shows it; zeros where there is no head."""
        scale = self.scales[layer, head]
        return self.rows[layer, head] * (0.0 if np.isnan(scale) else float(scale))

    def text(self) -> str:
        """The bytes of all heads in order, deflated, in base64."""
        return base64.b64encode(zlib.compress(self.rows.tobytes(), 9)).decode("ascii")
