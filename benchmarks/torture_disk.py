"""Run where the disk is full, a file may not grow, or the folder is read-only; then go on.

The bundled demo, cut very small, is fine-tuned on small tmpfs file systems (as root; left out
otherwise), under ``ulimit -f``, and in folders that must not be written. A run must then end well,
or with one line and no traceback; and once there is room it must go on to the bytes of an
undisturbed run. Run it from a checkout::

    python benchmarks/torture_disk.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torture_run as runs

# An undisturbed folder has 1.4 MB, and a checkpoint 0.6 MB.
TMPFS_KILOBYTES = (16, 100, 400, 650, 900, 1250, 1300, 1400, 1800, 2100)
# What a process prints is a file, too, so not 0.
LONGEST_KILOBYTES = (1, 2, 3, 100, 148, 300, 600)


@contextlib.contextmanager
def tmpfs(kilobytes: int, folder: Path) -> Iterator[Path]:
    """A file system of that size at ``folder``, which can grow."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "abft-mlx", folder], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Give a file system other options."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def begun(folder: Path) -> bool:
    """Whether there is a run to go on with."""
    return (folder / "recipe.yaml").is_file() and (folder / "run.json").is_file()


def ended(folder: Path, *, resume: bool, file_bytes: int | None = None) -> tuple[int | None, str]:
    """Run to the end: the exit status and what was printed."""
    said = Path(tempfile.gettempdir()) / f"abft-mlx-said-{os.getpid()}.txt"
    process = runs.start(folder, said, resume=resume, file_bytes=file_bytes)
    process.join(runs.PATIENCE_SECONDS)
    process.kill()
    text = said.read_text()
    said.unlink()
    return process.exitcode, text


def complaint(status: int | None, text: str) -> str | None:
    """What is wrong with how a run ended that could not write."""
    lines = text.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status == 0:
        return None
    if status not in (1, 2) or len(errors) != 1 or lines[-1:] != errors or "Traceback" in text:
        return f"ended with {status} and {text.strip()!r}"
    return None


def case(name: str, folder: Path, file_bytes: int | None = None) -> list[str]:
    """One run that may not be able to write, and what is wrong with it."""
    resume = begun(folder)
    status, text = ended(folder, resume=resume, file_bytes=file_bytes)
    wrong = complaint(status, text)
    said = text.strip().splitlines()[-1:] if status else ["ended well"]
    print(f"{name}: {said[0] if said else ''}", file=sys.stderr)
    return [f"{name}: {wrong}"] if wrong else []


def goes_on(name: str, folder: Path, wanted: dict[str, Any]) -> list[str]:
    """Now that there is room: what is wrong with the run as it ends."""
    status, text = ended(folder, resume=begun(folder))
    if status:
        return [f"{name}: does not go on: {text.strip()}"]
    return [f"{name}: {one}" for one in runs.differences(wanted, runs.contents(folder))]


def torture(place: Path, cases: int | None = None) -> tuple[int, list[str], bool]:
    """All cases, or so many of each kind.

    Returns:
        How many, what was lost, and whether file systems could be mounted.
    """
    runs.warm()
    runs.undisturbed(place / "undisturbed")
    wanted = runs.contents(place / "undisturbed")
    tried, lost = 0, []
    for kilobytes in LONGEST_KILOBYTES[:cases]:
        tried += 1
        name, folder = f"ulimit -f {kilobytes} kB", place / f"limit-{kilobytes}"
        wrong = case(name, folder, kilobytes * 1024)
        lost += wrong or goes_on(name, folder, wanted)
        shutil.rmtree(folder, ignore_errors=True)
    mounts = sys.platform == "linux" and os.geteuid() == 0
    for kilobytes in TMPFS_KILOBYTES[:cases] if mounts else ():
        tried += 1
        name = f"tmpfs of {kilobytes} kB"
        with tmpfs(kilobytes, place / f"tmpfs-{kilobytes}") as disk:
            wrong = case(name, disk / "run")
            remount(disk, "size=64m")
            lost += wrong or goes_on(name, disk / "run", wanted)
    if mounts:
        tried += 2
        with tmpfs(65536, place / "read-only") as disk:
            remount(disk, "ro")
            lost += case("read-only, a new run", disk / "run")
            remount(disk, "rw")
            shutil.copytree(place / "undisturbed", disk / "run")
            remount(disk, "ro")
            wrong = case("read-only, a run that goes on", disk / "run")
            remount(disk, "rw")
            lost += wrong or goes_on("read-only, a run that goes on", disk / "run", wanted)
    return tried, lost, mounts


def main(arguments: list[str] | None = None) -> int:
    """Torture, and print what was tried, what survived and what was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, help="at most so many of each kind")
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="abft-mlx-disk-") as folder:
        tried, lost, mounts = torture(Path(folder), given.cases)
    for line in lost:
        print(f"lost: {line}")
    if not mounts:
        print("tmpfs and read-only left out: mounting needs root on Linux")
    print(f"{time.monotonic() - begin:.0f} s")
    print(f"disk: tried {tried}, survived {tried - len(lost)}, lost {len(lost)}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
