"""Progress for a person: live lines on a terminal, plain lines anywhere else, nothing if quiet."""

from abft_mlx.cli._progress.board import Board
from abft_mlx.cli._progress.choice import board
from abft_mlx.cli._progress.words import duration, left, size

__all__ = ["Board", "board", "duration", "left", "size"]
