"""Which form of showing work fits where a command runs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from abft_mlx.cli._progress.board import Board
from abft_mlx.cli._progress.lines import Lines

if TYPE_CHECKING:
    from abft_mlx.cli._shell import Shell


@contextlib.contextmanager
def board(shell: Shell, *, live: bool = True) -> Iterator[Board]:
    """Show work on standard error while the block runs: live on a terminal, else in plain lines.

    Downloads are shown by themselves.

    Args:
        shell: of the command; a quiet one shows nothing.
        live: False where live lines would mix with what is printed.
    """
    from abft_mlx import hub

    made = _fitting(shell, live)
    try:
        with hub.watched(made.download):
            yield made
    finally:
        made.clear()


def _fitting(shell: Shell, live: bool) -> Board:
    if shell.quiet:
        return Board()
    terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    if not terminal:
        return Lines()
    if not live:
        return Board()
    from abft_mlx.cli._progress.live import LiveBoard

    return LiveBoard()
