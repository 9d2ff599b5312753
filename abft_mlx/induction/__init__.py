"""Induction heads: which heads look at the demonstrations' labels, how much, and how rightly."""

from abft_mlx.induction.census import HeadCensus
from abft_mlx.induction.detectors import REPEATED_TOKENS, SEQUENCES, Detected, detect, repeated_rows
from abft_mlx.induction.filter import head_filter, label_attention, threshold
from abft_mlx.induction.saved import HEADS_FILE, Example, Heads, HeadState, read_heads, write_heads
from abft_mlx.induction.table import Agreement, agreement, rows, write_csv
from abft_mlx.induction.window import WINDOW_SHARE, Window, window

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
    "rows",
    "threshold",
    "window",
    "write_csv",
    "write_heads",
]
