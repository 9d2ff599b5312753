"""Run where the disk is full, a file may not grow, or the folder is read-only; then go on.

The bundled demo, cut very small, is fine-tuned on small tmpfs file systems (as root; left out
otherwise), under a quota (as root, with btrfs-progs), under ``ulimit -f``, and in folders that must
not be written. A run must then end well,
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
QUOTA_KILOBYTES = (100, 700, 1300)
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


@contextlib.contextmanager
def quota(kilobytes: int, place: Path) -> Iterator[Path | None]:
    """A folder with that quota, on a btrfs of its own in a file; None where there can be none."""
    image, folder = place / "quota.img", place / "quota"
    folder.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(256 * 1024 * 1024)
    limited = folder / "limited"
    mounted = _run("mkfs.btrfs", "-q", image) and _run("mount", "-o", "loop", image, folder)
    try:
        made = (
            mounted
            and _run("btrfs", "quota", "enable", folder)
            and _run("btrfs", "subvolume", "create", limited)
            and allow(limited, f"{kilobytes}k")
        )
        yield limited if made else None
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        image.unlink()


def allow(folder: Path, size: str) -> bool:
    """Give a folder another quota."""
    return _run("btrfs", "qgroup", "limit", size, folder)


def _run(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:  # no such command
        return False


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


def torture(place: Path, cases: int | None = None) -> tuple[int, list[str], list[str]]:
    """All cases, or so many of each kind.

    Returns:
        How many, what was lost, and what was left out, and why.
    """
    runs.warm()
    runs.undisturbed(place / "undisturbed")
    wanted = runs.contents(place / "undisturbed")
    tried, lost, left_out = 0, [], []
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
    for kilobytes in QUOTA_KILOBYTES[:cases] if mounts else ():
        name = f"a quota of {kilobytes} kB"
        with quota(kilobytes, place) as folder:
            if folder is None:
                left_out.append("quotas: they need btrfs-progs and loop devices")
                break
            tried += 1
            wrong = case(name, folder / "run")
            allow(folder, "none")
            lost += wrong or goes_on(name, folder / "run", wanted)
    if not mounts:
        left_out.append("tmpfs, quotas and read-only: mounting needs root on Linux")
    else:
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
    return tried, lost, left_out


def main(arguments: list[str] | None = None) -> int:
    """Torture, and print what was tried, what survived and what was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, help="at most so many of each kind")
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="abft-mlx-disk-") as folder:
        tried, lost, left_out = torture(Path(folder), given.cases)
    for line in lost:
        print(f"lost: {line}")
    for line in left_out:
        print(f"left out: {line}")
    print(f"{time.monotonic() - begin:.0f} s")
    print(f"disk: tried {tried}, survived {tried - len(lost)}, lost {len(lost)}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
