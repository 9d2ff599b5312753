"""What a command tells of its work while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from abft_mlx.trainer import Update


class Board:
    """Takes what is known of the work that goes on; this one shows none of it.

    From outside in: the cell of a study, the updates of a training, the stage that runs now, a
    download.
    """

    def cell(self, name: str, number: int, total: int, seconds_left: float | None = None) -> None:
        """A cell of a study begins.

        Args:
            name: the cell's.
            number: from 1.
            total: cells.
            seconds_left: what this one and those after it will take, if that can be guessed.
        """

    def training(self, updates: int, validate_every: int = 0) -> None:
        """A training of so many updates begins."""

    def update(self, update: Update) -> None:
        """One update is done."""

    def stage(self, what: str, unit: str = "prompts") -> None:
        """Something begins, and whatever stage went on is over.

        Args:
            what: what it is, such as "base model, contextual"; "" where nothing begins.
            unit: what :meth:`count` counts.
        """

    def count(self, done: int, total: int | None) -> None:
        """So much of the stage is done; it is another measurement if the numbers fall."""

    def download(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """So much of a download is here; 0 bytes in all if that is not known."""

    def note(self, line: str) -> None:
        """Leave a line that stays."""

    def clear(self) -> None:
        """Take away what is shown, so that other things can be printed."""
