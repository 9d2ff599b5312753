"""Commands under ``mlx.launch``: several processes that work on one together, or are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from abft_mlx.ranks import Ranks


def join(*, resumable: bool) -> Ranks:
    """The processes that a command was started among.

    Args:
        resumable: a command that ends early can go on; says what to do when a rank is gone.
    """
    from abft_mlx import ranks

    return ranks.join(ranks.RESUME if resumable else ranks.AGAIN)


def alone(command: str) -> None:
    """Refuse to run a command that several processes would each do whole.

    Raises:
        UsageError: there are others.
    """
    size = join(resumable=False).size
    if size > 1:
        raise UsageError(
            f"mlx.launch runs {size} processes and {command} is for one; start it without "
            "mlx.launch (finetune, eval and study share their work)"
        )
