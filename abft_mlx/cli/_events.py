"""A run's events on the progress display."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abft_mlx.events import Events, Update

if TYPE_CHECKING:
    from abft_mlx.cli import _progress


class BoardEvents(Events):
    """Shows stages, prompts and updates on a board."""

    def __init__(self, board: _progress.Board) -> None:
        self._board = board

    def update(self, update: Update) -> None:
        """Show one update."""
        self._board.update(update)

    def stage(self, what: str) -> None:
        """Show what begins."""
        self._board.stage(what)

    def progress(self, done: int, total: int) -> None:
        """Show how many prompts are done."""
        self._board.count(done, total)
