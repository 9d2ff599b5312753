"""Progress of a measurement that is made in parts."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
OnStage = Callable[[str], None]


def part(on_progress: Progress | None, before: int, total: int) -> Progress | None:
    """A callback for one part, which tells the whole's how many prompts of all are done.

    Args:
        on_progress: told prompts done and prompts in all, or None.
        before: prompts of earlier parts.
        total: prompts of all parts.
    """
    if on_progress is None:
        return None
    return lambda done, _: on_progress(before + done, total)
