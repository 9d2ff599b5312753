"""Induction heads: which heads look at the demonstrations' labels, how much, and how rightly."""

from abft_mlx.induction.census import (
    WINDOW_SHARE,
    HeadCensus,
    Window,
    head_filter,
    label_attention,
    threshold,
    window,
)
from abft_mlx.induction.detectors import REPEATED_TOKENS, SEQUENCES, Detected, detect, repeated_rows
from abft_mlx.induction.saved import (
    HEADS_FILE,
    Agreement,
    Example,
    Heads,
    HeadState,
    agreement,
    read_heads,
    write_csv,
    write_heads,
)

__all__ = [
    "HEADS_FILE",
    "REPEATED_TOKENS",
    "SEQUENCES",
    "WINDOW_SHARE",
    "Agreement",
    "Detected",
    "Example",
    "HeadCensus",
    "HeadState",
    "Heads",
    "Window",
    "agreement",
    "detect",
    "head_filter",
    "label_attention",
    "read_heads",
    "repeated_rows",
    "threshold",
    "window",
    "write_csv",
    "write_heads",
]
