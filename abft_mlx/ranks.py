"""The processes that work on one run together, through MLX's own distributed engine.

``mlx.launch`` or ``mpirun`` decides how many there are and how they speak. The stream is left to
MLX, since the ring computes on CPU streams and NCCL on the GPU's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence

import mlx.core as mx

from abft_mlx.errors import RunError, UsageError

TIMEOUT_VARIABLE = "ABFT_MLX_RANK_TIMEOUT"
TIMEOUT_SECONDS = 1800.0
# The way out when a rank is gone, of a run that has checkpoints and of what has none.
RESUME = "--resume goes on from the last checkpoint"
AGAIN = "nothing is lost by starting again"


class Ranks:
    """This process's place among the processes of a run; alone, it sends nothing.

    Args:
        group: MLX's group of processes, or None for this process alone.
        timeout_seconds: how long one exchange may wait for the slowest rank.
        way_out: what to do when a rank is gone, for the message.

    Attributes:
        rank: this process's number, from 0.
        size: processes of the run.
    """

    def __init__(
        self,
        group: mx.distributed.Group | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        way_out: str = RESUME,
    ) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.timeout_seconds = timeout_seconds
        self._way_out = way_out

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def sum(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Arrays of the same shapes on every rank, summed over all, sent as float32.

        Raises:
            RunError: a rank is gone.
        """
        if self.size == 1:
            return list(arrays)
        flat = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in arrays])
        mx.eval(flat)  # this rank's own work is not the exchange's
        with self._exchange():
            flat = mx.distributed.all_sum(flat, group=self._group)
            mx.eval(flat)
        summed, start = [], 0
        for array in arrays:
            piece = flat[start : start + array.size]
            summed.append(piece.reshape(array.shape).astype(array.dtype))
            start += array.size
        return summed

    def count(self, number: int) -> int:
        """A whole number, below 2**24 in all, summed over all ranks."""
        if self.size == 1:
            return number
        return int(self.sum([mx.array([number], dtype=mx.float32)])[0].item())

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.count(1)

    def agree(self, text: str, what: str) -> None:
        """Check that every rank has the same text.

        Args:
            text: anything that must not differ.
            what: what it stands for, for the message.

        Raises:
            UsageError: it differs; every rank raises it.
            RunError: a rank is gone.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(text.encode()).digest()[:8]
        with self._exchange():
            own = mx.array([list(digest)], dtype=mx.int32)
            digests = mx.distributed.all_gather(own, group=self._group).tolist()
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if different:
            raise UsageError(
                f"rank {different[0]} was started with another {what} than rank 0; give every "
                "rank the same"
            )

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        # JACCL, and the ring before MLX 0.32.4, wait for ever for a rank that is gone, inside MLX,
        # where no signal handler of Python runs: only leaving the process ends that.
        timer = threading.Timer(self.timeout_seconds, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            raise RunError(
                f"rank {self.rank} of {self.size} lost another rank and stops ({error}); what that "
                f"rank printed says why, and {self._way_out}"
            ) from error
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        line = (
            f"error: rank {self.rank} of {self.size} has waited {self.timeout_seconds:g} s for "
            f"another rank and stops; {TIMEOUT_VARIABLE} sets the seconds, and {self._way_out}\n"
        )
        os.write(2, line.encode())
        os._exit(1)


def join(way_out: str = RESUME) -> Ranks:
    """The ranks that this process was started among, or this process alone.

    Raises:
        RunError: the other ranks cannot be reached.
        UsageError: the timeout in the environment is not a number of seconds.
    """
    value = os.environ.get(TIMEOUT_VARIABLE)
    try:
        timeout_seconds = TIMEOUT_SECONDS if value is None else float(value)
    except ValueError:
        timeout_seconds = 0.0
    if not 0 < timeout_seconds < threading.TIMEOUT_MAX:
        raise UsageError(f"{TIMEOUT_VARIABLE}={value}: must be a number of seconds above 0")
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"cannot join the other ranks ({error}); see that the host file's addresses are right "
            "and free, and that every rank was started"
        ) from error
    return Ranks(group if group.size() > 1 else None, timeout_seconds, way_out)
