"""Progress for a person: live lines on a terminal, plain lines anywhere else, nothing if quiet."""

from abft_mlx.cli._progress.board import Board, board
from abft_mlx.cli._progress.words import duration, left, size

__all__ = ["Board", "board", "duration", "left", "size"]
