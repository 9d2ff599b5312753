"""All of the torture, one harness after the other, and one table at the end.

Each harness is a command of its own, too. The exit status is 1 if anything was lost or a harness
did not come to its end. Run it from a checkout::

    python benchmarks/torture.py              # a whole round, under 30 minutes on two cores
    python benchmarks/torture.py --short      # a look, in a few minutes
    python benchmarks/torture.py --only disk --only fuzz
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
END = re.compile(r"^(\w+): tried ([\d,]+), survived ([\d,]+), lost ([\d,]+)")


@dataclass(frozen=True)
class Harness:
    """One command.

    Attributes:
        name: as its last line has it; its file is ``torture_NAME.py``.
        words: of a whole round.
        short: of a look.
        seconds: that a round may take; then it is ended, and counts as lost.
    """

    name: str
    words: tuple[str, ...]
    short: tuple[str, ...]
    seconds: float


# Together under 30 minutes; each at about one and a half times what it took.
HARNESSES = (
    Harness("kill", ("--kills", "60", "--seed", "1"), ("--kills", "4"), 470),
    Harness("disk", (), ("--cases", "2"), 360),
    Harness("fuzz", ("--seconds", "480"), ("--cases", "4"), 540),
)


@dataclass(frozen=True)
class Row:
    """What a harness came to; counts are None where it did not say."""

    name: str
    tried: int | None
    survived: int | None
    lost: int | None
    seconds: float
    status: int

    @property
    def fine(self) -> bool:
        """Whether it came to its end and lost nothing."""
        return self.status == 0 and self.lost == 0 and bool(self.tried)


def run(name: str, command: Sequence[str | Path], seconds: float) -> Row:
    """Run one harness; what it prints is shown as it comes."""
    print(f"== {name} (at most {seconds:.0f} s)", flush=True)
    begun = time.monotonic()
    with _interruptible():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, errors="replace"
        )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    said, cut = "", False
    try:
        while process.poll() is None:
            said += _more(process.stdout.fileno())
            if time.monotonic() - begun > seconds:
                cut = True
                break
            time.sleep(0.2)
    finally:
        _end(process)
    said += _more(process.stdout.fileno())
    process.stdout.close()
    counts = (None, None, None)
    for line in said.splitlines():
        if (found := END.match(line)) and found[1] == name:
            counts = tuple(int(one.replace(",", "")) for one in found.groups()[1:])
    took = time.monotonic() - begun
    if cut:
        print(f"{name} was ended after {took:.0f} s", flush=True)
    return Row(name, *counts, took, 1 if cut else process.returncode)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What is started in the block can be interrupted, although a job in the background cannot."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _more(descriptor: int) -> str:
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(descriptor, 65536):
            parts.append(part)
    text = b"".join(parts).decode(errors="replace")
    print(text, end="", flush=True)
    return text


def _end(process: subprocess.Popen[str]) -> None:
    """End a harness that still runs, and its processes; it may unmount what it mounted."""
    for number, patience in ((signal.SIGINT, 30.0), (signal.SIGKILL, 10.0)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def table(rows: Sequence[Row]) -> str:
    """Tried, survived, lost and seconds, by harness."""
    lines = ["| harness | tried | survived | lost | seconds |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        shown = ["?" if n is None else f"{n:,}" for n in (row.tried, row.survived, row.lost)]
        lines.append(f"| {row.name} | {' | '.join(shown)} | {row.seconds:,.0f} |")
    sums = [sum(getattr(row, key) or 0 for row in rows) for key in ("tried", "survived", "lost")]
    shown = [f"{n:,}" for n in sums]
    lines.append(f"| all | {' | '.join(shown)} | {sum(row.seconds for row in rows):,.0f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Torture, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [one.name for one in HARNESSES]
    parser.add_argument("--only", action="append", choices=names, help="a harness; repeatable")
    parser.add_argument("--short", action="store_true", help="a few cases of each")
    given = parser.parse_args(arguments)
    rows = []
    for one in HARNESSES:
        if given.only is None or one.name in given.only:
            words = one.short if given.short else one.words
            command = [sys.executable, HERE / f"torture_{one.name}.py", *words]
            rows.append(run(one.name, command, one.seconds))
    print(f"\n{table(rows)}")
    wrong = [row.name for row in rows if not row.fine]
    if wrong:
        print(f"not as it should be: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
