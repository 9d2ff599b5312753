"""Let memory run out: before Python starts, in loading, in a step, in a checkpoint; then go on.

The bundled demo, cut very small, is fine-tuned and evaluated under ``ulimit -v``, at sizes from
"not even Python starts" up, and under limits that begin at a phase: as soon as a file appears or
changes that marks it, the process may take only so much more. As root on Linux it also runs in a
control group whose memory is too small. A run must then end well, or with one line and no
traceback, or be ended by the system or by a native library, which leaves no chance to say anything;
and without the limit it must go on to the bytes of an undisturbed run. Linux only. Run it from a
checkout::

    python benchmarks/torture_memory.py
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torture_kill as kill
import torture_run as runs

# Megabytes of address space for a whole process, from its first byte on.
COLD = (16, 40, 120, 400, 900)
# Megabytes beside what a process has that has imported everything and computed nothing.
ROOMS = (0, 2, 5, 10, 20, 40, 80, 160, 320, 480, 640, 800, 1000, 1600)
# Megabytes beside what a run has taken when a phase begins.
LATE_ROOMS = (0, 8, 40, 100)
EVALUATIONS = (0, 20, 320, 700)
GROUPS = (60, 200)
MUCH = 1 << 42
GROUP_FOLDER = Path("/sys/fs/cgroup/memory")
LONGEST_SECONDS = 150.0


@dataclass
class Tally:
    """What came of the cases.

    Attributes:
        ways: how they ended: well, with one line, or ended from outside without a word.
        lost: what was not as it should be, a line each; at most one of a case.
        tried: how many there were.
    """

    ways: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    tried: int = 0

    def note(self, name: str, way: str, wrong: list[str]) -> None:
        """Count a case."""
        self.tried += 1
        self.ways[way] += 1
        if wrong:
            self.lost.append(f"{name}: {'; '.join(wrong)}")
        print(f"{name}: {wrong or way}", file=sys.stderr, flush=True)


def judged(status: int | None, text: str) -> tuple[str, list[str]]:
    """How a run ended, and what is wrong with that."""
    if status == 0:
        return "ended well", []
    if status is None:
        return "hung", [f"did not end in {LONGEST_SECONDS:.0f} s"]
    if status < 0:
        return "ended without a word", []
    lines = text.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status != 1 or len(errors) != 1 or lines[-1:] != errors or "Traceback" in text:
        return "ended otherwise", [f"ended with {status} and {text.strip()[-600:]!r}"]
    if "memory" not in errors[0]:
        return "ended otherwise", [f"does not speak of memory: {errors[0]!r}"]
    return "one line", []


def wait(process: BaseProcess) -> int | None:
    """The exit status; None of one that hangs, and is killed."""
    process.join(LONGEST_SECONDS)
    status = process.exitcode
    process.kill()
    process.join()
    return status


def after(folder: Path, said: Path, wanted: dict[str, Any]) -> list[str]:
    """Without a limit: what is wrong with the run as it ends."""
    resume = (folder / "recipe.yaml").is_file() and (folder / "run.json").is_file()
    process = runs.start(folder, said, resume=resume)
    status = wait(process)
    text = said.read_text()
    if status != 0:
        return [f"does not go on ({status}): {text.strip()[-600:]}"]
    if "going on from" in text:
        return [f"went on with a complaint: {text.strip()}"]
    return runs.differences(wanted, runs.contents(folder))


def limited(folder: Path, said: Path, megabytes: int) -> tuple[int | None, str]:
    """A run that has so much room from the beginning."""
    process = runs.start(folder, said, resume=False, room_bytes=megabytes * 10**6)
    status = wait(process)
    return status, said.read_text()


def limited_late(
    folder: Path, said: Path, chance: random.Random, phase: str, megabytes: int
) -> tuple[int | None, str]:
    """A run that has so much room from some moment of a phase on."""
    process = runs.start(folder, said, resume=False, room_bytes=MUCH)
    # Each phase shows itself so often that a run has it once more.
    skip = chance.randint(0, 3) if phase in ("step", "checkpoint", "validation") else 0
    if kill.wait_for(process, folder, phase, skip, chance.uniform(0.0, 0.01)):
        assert process.pid is not None
        with contextlib.suppress(OSError):  # it has ended meanwhile
            room = runs.taken(process.pid) + megabytes * 10**6
            resource.prlimit(process.pid, resource.RLIMIT_AS, (room, -1))
    return wait(process), said.read_text()


def cold(folder: Path, megabytes: int) -> tuple[int | None, str]:
    """A run of a fresh Python under a limit on all of it."""
    changes = [part for one in runs.SETTINGS for part in ("--set", one)]
    command = [
        sys.executable, Path(__file__).parents[1] / "cli.py", "finetune", "demo",
        "--output", folder, "--overwrite", "--quiet", *changes,
    ]  # fmt: skip
    limit = megabytes * 10**6
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
    except subprocess.TimeoutExpired:
        return None, ""
    except (OSError, subprocess.SubprocessError):
        return -1, ""
    return done.returncode, done.stderr


@contextlib.contextmanager
def control_group(megabytes: int) -> Iterator[Path | None]:
    """A control group with so much memory; None where there can be none."""
    group = GROUP_FOLDER / f"abft-mlx-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        (group / "memory.limit_in_bytes").write_text(str(megabytes * 10**6))
        yield group
    except OSError:
        yield None
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def grouped(folder: Path, said: Path, group: Path) -> tuple[int | None, str]:
    """A run that is put into a control group as soon as its folder is there."""
    process = runs.start(folder, said, resume=False)
    while process.is_alive() and not folder.exists():
        time.sleep(0.001)
    with contextlib.suppress(OSError):
        (group / "cgroup.procs").write_text(str(process.pid))
    return wait(process), said.read_text()


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a folder by its hash."""
    files = sorted(one for one in folder.rglob("*") if one.is_file())
    return {str(one): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def evaluated(run: Path, said: Path, megabytes: int) -> tuple[int | None, str, list[str]]:
    """An evaluation of a finished run with so much room; the run must stay as it is."""
    (run / "eval.json").unlink(missing_ok=True)
    before = hashes(run)
    words = ["eval", "--adapter", str(run), "--set", "evaluation.queries=16", "--quiet"]
    process = runs.spawn(words, said, room_bytes=megabytes * 10**6)
    status = wait(process)
    if status == 0:
        (run / "eval.json").unlink()
    wrong = [] if hashes(run) == before else ["the run is not what it was"]
    return status, said.read_text(), wrong


def started(text: str) -> str:
    """What a fresh Python that failed came to: a line, or no start at all."""
    return "one line" if "error: " in text else "did not start"


def torture(place: Path, seed: int, cases: int | None) -> Tally:
    """All cases, or so many of each kind."""
    runs.warm()
    tally, chance, said = Tally(), random.Random(seed), place / "said.txt"
    whole = place / "undisturbed"
    runs.undisturbed(whole)
    wanted = runs.contents(whole)
    run = place / "run"

    def case(name: str, status: int | None, text: str) -> None:
        way, wrong = judged(status, text)
        tally.note(name, way, wrong or after(run, said, wanted))
        shutil.rmtree(run, ignore_errors=True)

    for megabytes in COLD[:cases]:
        status, text = cold(run, megabytes)
        if status and not run.exists() and started(text) == "did not start":
            tally.note(f"{megabytes} MB for all of Python", "did not start", [])
        else:
            case(f"{megabytes} MB for all of Python", status, text)
    for megabytes in ROOMS[:cases]:
        case(f"{megabytes} MB more", *limited(run, said, megabytes))
    for phase in list(kill.PHASES)[:cases]:
        for megabytes in LATE_ROOMS[:cases]:
            ended = limited_late(run, said, chance, phase, megabytes)
            case(f"{megabytes} MB more from a {phase} on", *ended)
    for megabytes in EVALUATIONS[:cases]:
        status, text, wrong = evaluated(whole, said, megabytes)
        way, more = judged(status, text)
        tally.note(f"eval with {megabytes} MB more", way, more + wrong)
    for megabytes in GROUPS[:cases]:
        with control_group(megabytes) as group:
            if group is None:
                print("control groups left out: none can be made here", file=sys.stderr)
                break
            status, text = grouped(run, said, group)
        case(f"a control group of {megabytes} MB", status, text)
    return tally


def main(arguments: list[str] | None = None) -> int:
    """Torture, and print what was tried, what survived and what was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--cases", type=int, help="at most so many of each kind")
    given = parser.parse_args(arguments)
    if sys.platform != "linux":
        print("memory: tried 0, survived 0, lost 0 (limits on memory need Linux)")
        return 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="abft-mlx-memory-") as folder:
        tally = torture(Path(folder), given.seed, given.cases)
    lost = len(tally.lost)
    for line in tally.lost:
        print(f"lost: {line}")
    ways = ", ".join(f"{way} {count}" for way, count in sorted(tally.ways.items()))
    print(f"by end: {ways}")
    print(f"{time.monotonic() - begun:.0f} s, seed {given.seed}")
    print(f"memory: tried {tally.tried}, survived {tally.tried - lost}, lost {lost}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
