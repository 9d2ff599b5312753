"""Damaged and hostile input for every reader, by the thousand, from a seed.

    python benchmarks/torture_fuzz.py                 # a whole round, on two cores
    python benchmarks/torture_fuzz.py --only parquet --cases 500 --seed 7
    python benchmarks/torture_fuzz.py --only parquet --case 123     # one case again, as a traceback

A case is lost if its reader does anything but end well or refuse the input with a UsageError of one
line that names file, row or field: another exception, more than ALARM_SECONDS, MOST_BYTES more
memory, a file left behind by a refusal, or the death of the process. What is lost is also written
to a file, a line of JSON each, as it is found. The exit status is 1 if any is lost or not all
cases were come to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from fuzz_commands import COMMANDS  # noqa: E402
from fuzz_models import MODEL_READERS  # noqa: E402
from fuzz_readers import READERS, Reader  # noqa: E402
from fuzz_runs import RUN_READERS  # noqa: E402

ALL = {one.name: one for one in (*READERS, *RUN_READERS, *MODEL_READERS, COMMANDS)}
ALARM_SECONDS = 20
STUCK_SECONDS = 90
MOST_BYTES = 700_000_000
LONGEST_MESSAGE = 3000
BLOCK = 100
PROGRESS = 500
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
         "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg",
         "TRANSFORMERS_VERBOSITY": "critical", "RUST_BACKTRACE": "0", "HF_TOKEN": ""}  # fmt: skip


class TooLong(BaseException):
    """A case took longer than ALARM_SECONDS."""


def outcome(reader: Reader, sample: Any, seed: int, number: int, folder: Path) -> str | None:
    """Run one case in a folder of its own; None, or what was wrong with how it ended."""
    reader.make(Random(f"{seed}/{reader.name}/{number}"), sample, folder)
    return judged(reader, sample, folder)


def judged(reader: Reader, sample: Any, folder: Path) -> str | None:
    """Read what lies in a folder; None, or what was wrong with how that ended."""
    from abft_mlx.cli.shell import one_line
    from abft_mlx.errors import UsageError

    before = set(folder.rglob("*"))
    names = [path.name for path in before] + [
        str(folder),
        "row ",
        "line ",
        "--set",
        "--results",
        "study ",
        "study.json",
    ]
    peak = _peak_bytes()
    signal.setitimer(signal.ITIMER_REAL, ALARM_SECONDS)
    wrong = None
    try:
        reader.read(sample, folder)
    except UsageError as error:
        message = one_line(str(error))
        if not any(name in message for name in names):
            wrong = f"names neither file, row nor field: {message[:300]!r}"
        elif len(message) > LONGEST_MESSAGE:
            wrong = f"a message of {len(message)} characters: {message[:200]!r}"
        # What is being written has a hidden name until it is whole.
        torn = [one.name for one in set(folder.rglob("*")) - before if one.name.startswith(".")]
        if torn:
            wrong = f"left {torn}"
    except TooLong:
        wrong = f"took more than {ALARM_SECONDS} s: {_where()}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        wrong = f"{type(error).__name__}: {str(error)[:300]} [{_where()}]"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = _peak_bytes() - peak
    if wrong is None and grown > MOST_BYTES:
        wrong = f"took {grown / 1e6:,.0f} MB"
    return wrong


def _where() -> str:
    """The last line of ours, and the last line, of the traceback at hand."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [
        one for one in frames if "abft_mlx" in one.filename and "site-packages" not in one.filename
    ]
    chosen = [f"{Path(one.filename).name}:{one.lineno}" for one in (*ours[-1:], *frames[-1:])]
    return ", ".join(dict.fromkeys(chosen))


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _alarm(_number: int, _frame: Any) -> None:
    raise TooLong


def prepared(reader: Reader, folder: Path) -> Any:
    """A reader's samples, in a folder that its cases do not touch."""
    made = folder / "samples" / reader.name.replace(" ", "-")
    made.mkdir(parents=True)
    return reader.prepare(made)


def work(readers: list[Reader], seed: int) -> None:
    """Run the cases that standard input names, ``reader first count`` in JSON, and tell of each."""
    signal.signal(signal.SIGALRM, _alarm)
    out, sys.stdout = sys.stdout, sys.stderr
    by_name = {one.name: one for one in readers}
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)
        for line in sys.stdin:
            name, first, count = json.loads(line)
            reader = by_name[name]
            if name not in samples:
                samples[name] = prepared(reader, folder)
            for number in range(first, first + count):
                print(json.dumps(["begin", name, number]), file=out, flush=True)
                case = folder / "case"
                case.mkdir()
                wrong = outcome(reader, samples[name], seed, number, case)
                shutil.rmtree(case)
                print(json.dumps(["end", name, number, wrong]), file=out, flush=True)
            print(json.dumps(["block"]), file=out, flush=True)


class Round:
    """The blocks that are left to do, and what came of those that are done.

    Args:
        blocks: reader, first case, how many.
        seed: of the cases.
        findings: where each lost case is written as it is found.
        seconds: after which no block is begun any more.
    """

    def __init__(
        self, blocks: list[tuple[str, int, int]], seed: int, findings: Path, seconds: float
    ) -> None:
        self.blocks = blocks
        self.seed = seed
        self.findings = findings
        self.wanted = sum(count for _, _, count in blocks)
        self.begun = time.monotonic()
        self.end = self.begun + seconds
        self.tried: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.lost: list[tuple[str, int, str]] = []
        self.lock = threading.Lock()

    def next(self) -> tuple[str, int, int] | None:
        """The next block, or None."""
        with self.lock:
            if not self.blocks or time.monotonic() > self.end:
                return None
            return self.blocks.pop()

    def note(self, name: str, number: int, wrong: str | None) -> None:
        """Count a case."""
        with self.lock:
            self.tried[name] += 1
            done = sum(self.tried.values())
            if done % PROGRESS == 0:
                took = time.monotonic() - self.begun
                line = f"{done:,} of {self.wanted:,} cases, {len(self.lost)} lost, {took:.0f} s"
                print(line, file=sys.stderr, flush=True)
            if wrong is not None:
                self.lost.append((name, number, wrong))
                print(f"lost: {name} {number}: {wrong}", file=sys.stderr, flush=True)
                found = {"seed": self.seed, "reader": name, "case": number, "wrong": wrong}
                with self.findings.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(found) + "\n")

    def run(self) -> None:
        """Feed one process after the other; one that dies or is stuck loses its case alone."""
        block = self.next()
        while block is not None:
            block = self._process(block)

    def _process(self, block: tuple[str, int, int] | None) -> tuple[str, int, int] | None:
        command = [sys.executable, __file__, "--worker", "--seed", str(self.seed)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, **QUIET},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        heard = [time.monotonic()]
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(5):
                if time.monotonic() - heard[0] > STUCK_SECONDS:
                    process.kill()

        threading.Thread(target=watch, daemon=True).start()
        begun: tuple[str, int] | None = None
        try:
            while block is not None:
                name, first, count = block
                process.stdin.write(json.dumps(block) + "\n")
                process.stdin.flush()
                since = time.monotonic()
                for line in process.stdout:
                    heard[0] = time.monotonic()
                    told = json.loads(line)
                    if told[0] == "block":
                        break
                    begun = (told[1], told[2]) if told[0] == "begin" else None
                    if told[0] == "end":
                        self.note(told[1], told[2], told[3])
                else:
                    status = process.wait()
                    if begun is None:
                        raise RuntimeError(f"the samples of {name} cannot be made ({status})")
                    self.note(*begun, f"the process died ({status})")
                    done = begun[1] + 1
                    rest = first + count - done
                    return (name, done, rest) if rest else self.next()
                with self.lock:
                    self.seconds[name] += time.monotonic() - since
                block = self.next()
        finally:
            ended.set()
            process.stdin.close()
            process.wait()
        return None


def table(found: Round) -> str:
    """Tried, survived, lost and the seconds of a process, by reader."""
    lost = Counter(name for name, _, _ in found.lost)
    lines = ["| reader | tried | survived | lost | seconds |", "|---|---:|---:|---:|---:|"]
    for name in ALL:
        if found.tried[name]:
            kept = found.tried[name] - lost[name]
            took = found.seconds[name]
            lines.append(
                f"| {name} | {found.tried[name]:,} | {kept:,} | {lost[name]:,} | {took:.0f} |"
            )
    total = sum(found.tried.values())
    gone = sum(lost.values())
    took = sum(found.seconds.values())
    lines.append(f"| all | {total:,} | {total - gone:,} | {gone:,} | {took:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, help="of each reader, instead of its share of a round")
    parser.add_argument("--only", action="append", choices=list(ALL), help="a reader; repeatable")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int, help="one case of --only, with its traceback")
    parser.add_argument(
        "--seconds", type=float, default=1500.0, help="after which no more cases are begun"
    )
    parser.add_argument(
        "--findings", type=Path, default=ROOT / "build" / "torture" / "fuzz.jsonl",
        help="where lost cases are written as they are found",
    )  # fmt: skip
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    readers = [ALL[name] for name in asked.only or ALL]
    if asked.worker:
        work(readers, asked.seed)
        return 0
    if asked.case is not None:
        return again(readers[0], asked.seed, asked.case)
    blocks = [
        (one.name, first, min(BLOCK, (asked.cases or one.share) - first))
        for one in reversed(readers)
        for first in range(0, asked.cases or one.share, BLOCK)
    ]
    asked.findings.parent.mkdir(parents=True, exist_ok=True)
    asked.findings.write_text("", encoding="utf-8")
    found = Round(blocks, asked.seed, asked.findings, asked.seconds)
    threads = [threading.Thread(target=found.run, daemon=True) for _ in range(asked.workers)]
    for one in threads:
        one.start()
    with contextlib.suppress(KeyboardInterrupt):  # what was found until then is told
        for one in threads:
            one.join()
    return told(found, asked.workers)


def told(found: Round, workers: int) -> int:
    """Print what came of a round; gives the exit status."""
    print(table(found))
    took = time.monotonic() - found.begun
    print(f"\nseed {found.seed}, {took:.0f} s, {workers} processes")
    if found.lost:
        print(f"what was lost lies in {found.findings}")
    tried, lost = sum(found.tried.values()), len(found.lost)
    if tried < found.wanted:
        print(f"only {tried:,} of {found.wanted:,} cases were come to")
    print(f"fuzz: tried {tried}, survived {tried - lost}, lost {lost}", flush=True)
    return 1 if lost or tried < found.wanted else 0


def again(reader: Reader, seed: int, number: int) -> int:
    """Read one case again and let what it raises show; its files stay."""
    os.environ.update(QUIET)

    folder = Path(tempfile.mkdtemp())
    sample = prepared(reader, folder)
    (folder / "case").mkdir()
    reader.make(Random(f"{seed}/{reader.name}/{number}"), sample, folder / "case")
    print(f"the case lies in {folder / 'case'}", file=sys.stderr)
    reader.read(sample, folder / "case")
    return 0


if __name__ == "__main__":
    sys.exit(main())
