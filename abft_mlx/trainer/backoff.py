"""Micro-batches that fit: measured before the first update, halved where memory runs out.

MLX's CPU backend on Linux does not raise where memory runs out, but crashes, and macOS may end a
process: so what is doubtful is measured first. Elsewhere an update whose gradients did not fit is
begun again with smaller micro-batches; nothing of it has been applied by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

from abft_mlx import runtime
from abft_mlx.errors import RunError

Result = TypeVar("Result")
Work = TypeVar("Work")

# What MLX counts is not all that a process takes, and prompts are not all alike.
ROOM_SHARE = 0.8


class Backoff:
    """How many prompts a micro-batch has, and what is done where they are too many.

    Args:
        rows: prompts of a micro-batch to begin with.
        smallest: the fewest that it can be cut into: 1, or those that share demonstrations.
        automatic: whether it may be cut.
        longest_tokens: longest prompt of the run, for messages.

    Attributes:
        rows: prompts of a micro-batch now.
    """

    def __init__(self, rows: int, smallest: int, automatic: bool, longest_tokens: int) -> None:
        self.rows = max(rows, smallest)
        self.smallest = smallest
        self.automatic = automatic
        self.longest_tokens = longest_tokens
        self._was: int | None = None
        self._why = ""

    def measure(self, peak_bytes: Callable[[int], int], room_bytes: int) -> None:
        """Take as many rows as fit, by the peaks of two small micro-batches.

        Args:
            peak_bytes: computes the gradients of so many of the longest prompts and gives the peak
                of MLX's memory meanwhile, beside what it held before.
            room_bytes: what MLX may take beside what it holds.
        """
        room = int(room_bytes * ROOM_SHARE)
        rows, smallest = self.rows, self.smallest
        one = peak_bytes(smallest)
        # Twice the prompts take at most twice as much.
        if rows > smallest and 2 * one > room:
            rows = smallest
        elif rows > smallest:
            each = max(0, peak_bytes(2 * smallest) - one)
            while rows > smallest and one + each * (rows / smallest - 1) > room:
                rows //= 2
        if rows < self.rows:
            self._change(rows, f"{room_bytes / 1e9:.1f} GB of memory are left")

    def smaller(self, tried: int, said: str) -> None:
        """Halve the rows, because memory ran out.

        Args:
            tried: how many there were; fewer than ``rows`` in a small update.
            said: MLX's own words.

        Raises:
            RunError: they cannot be halved, or must not.
        """
        if not self.automatic:
            raise RunError(
                f"memory ran out with {tried} prompts in a micro-batch ({said}); set "
                "training.micro_batch_tokens to auto, or lower it; the last checkpoint stays"
            )
        if tried <= self.smallest:
            self.fail(said)
        self._change(max(self.smallest, tried // 2), said)

    def fail(self, said: str) -> NoReturn:
        """End a run that fits in no pieces."""
        what = "a prompt" if self.smallest == 1 else f"{self.smallest} prompts"
        fewer = "" if self.smallest == 1 else "lower training.shared_demonstrations, "
        raise RunError(
            f"{what} of {self.longest_tokens} tokens cannot be trained on in the memory there is "
            f"({said}); {fewer}set training.gradient_checkpointing to true or training.gradient to "
            "local, take a 4-bit copy of the model, or fewer prompt.demonstrations; the last "
            "checkpoint stays"
        )

    def _change(self, rows: int, why: str) -> None:
        self._was = self._was or self.rows
        self.rows, self._why = rows, why

    def news(self) -> str | None:
        """What has changed since this was last asked, in a line."""
        was, self._was = self._was, None
        if was is None:
            return None
        return f"{self.rows} prompts in a micro-batch instead of {was}: {self._why}"


def attempt(
    work: Callable[[Work], Result], given: Work, smaller: Callable[[str], Work] | None
) -> Result:
    """Do some work, and where memory runs out do it again on something smaller.

    Args:
        work: leaves nothing behind when it fails.
        given: what it works on at first.
        smaller: told MLX's words, gives what to try next, or raises; None to fail at once.
    """
    while True:
        try:
            return work(given)
        except (RuntimeError, MemoryError) as error:
            if smaller is None or not runtime.out_of_memory(error):
                raise
            said = str(error) or type(error).__name__
        # Only now are the arrays gone that the exception's frames held.
        runtime.release_memory()
        given = smaller(said)
