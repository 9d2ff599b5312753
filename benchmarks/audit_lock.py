"""Ask whether an advisory is known for a locked version, and say plainly whether anybody answered.

    python benchmarks/audit_lock.py

asks PyPI, then OSV, through pip-audit, about every package of ``requirements/dev.lock`` that this
platform would install. It ends with 0 where none is known, with 1 where one is, and with 3 where
no service answered for all packages: pip-audit itself ends with 0 where PyPI's answer was "not
found". ``--where-reachable`` ends with 0 in that case, too, and still says so.

Advisories that do no harm here are listed in ``requirements/accepted-advisories.txt``: an id a
line, then why.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
LOCK = CHECKOUT / "requirements" / "dev.lock"
ACCEPTED = CHECKOUT / "requirements" / "accepted-advisories.txt"
CLEAN, FOUND, WRONG_USAGE, NOT_CHECKED = 0, 1, 2, 3
SERVICES = ("pypi", "osv")


@dataclass
class Answer:
    """What one service said: packages that it knows, and does not know, and their advisories."""

    known: list[str] = field(default_factory=list)
    advisories: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the service answered for every package."""
        return bool(self.known) and not self.unknown


def read(document: dict[str, Any]) -> Answer:
    """The answer in pip-audit's JSON."""
    answer = Answer()
    for package in document["dependencies"]:
        name = package["name"]
        if "skip_reason" in package:
            answer.unknown.append(name)
            continue
        answer.known.append(name)
        for one in package["vulns"]:
            mended = ", ".join(one["fix_versions"]) or "no version yet"
            version = package["version"]
            answer.advisories.append(f"{name} {version}: {one['id']}, mended in {mended}")
    return answer


def accepted(path: Path) -> list[str]:
    """The ids of advisories that were looked at and do no harm here.

    Raises:
        ValueError: a line without a reason.
    """
    ids = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, reason = line.partition(" ")
        if not reason.strip():
            raise ValueError(f"{path} line {number}: {name} has no reason; write it after the id")
        ids.append(name)
    return ids


def pip_audit(lock: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pip-audit on a lock file."""
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--require-hashes",
        "--disable-pip", "--format", "json", "--progress-spinner", "off", "--desc", "off",
        "--timeout", "10", *options,
    ]  # fmt: skip
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def refused(lock: Path) -> str | None:
    """Why pip-audit cannot read a lock file, or cannot run; None where it can. Asks no service."""
    done = pip_audit(lock, "--dry-run")
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["pip-audit failed"])[-1]


def ask(lock: Path, service: str, *options: str) -> Answer | None:
    """One service's answer about a lock file; None where it gave none."""
    done = pip_audit(lock, "--vulnerability-service", service, *options)
    # Both a known advisory and a failure end with 1; after a failure there is no document.
    if not done.stdout.startswith("{"):
        return None
    return read(json.loads(done.stdout))


def first_package(lock: Path) -> str:
    """The lock file's lines of its first package: who knows none does not know it, either."""
    lines: list[str] = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        begins = not line.startswith((" ", "#"))
        if lines and begins:
            break
        # One with a marker may not be for this platform.
        if lines or (begins and ";" not in line):
            lines.append(line)
    return "\n".join(lines) + "\n"


def answered(lock: Path, service: str, *options: str) -> Answer | None:
    """One service's answer about all packages; None where it does not know even the first."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "first.txt"
        probe.write_text(first_package(lock), encoding="utf-8")
        first = ask(probe, service, *options)
    if first is None or not first.known:
        return None
    return ask(lock, service, *options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0, 1 or 3, as said above, or 2 for wrong usage.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--where-reachable", action="store_true", help="0 where none answered, too")
    parser.add_argument("--lock", type=Path, default=LOCK, help="the lock file")
    parser.add_argument("--accepted", type=Path, default=ACCEPTED, help="harmless advisories")
    parser.add_argument("--service", choices=SERVICES, action="append", help="ask only these")
    parser.add_argument("--osv-url", help="where OSV is asked, in place of its own address")
    chosen = parser.parse_args(arguments)
    try:
        ignored = [word for one in accepted(chosen.accepted) for word in ("--ignore-vuln", one)]
        if not chosen.lock.is_file():
            raise ValueError(f"{chosen.lock}: no such file; make lock writes it")
        if not first_package(chosen.lock).strip():
            raise ValueError(f"{chosen.lock} locks no package; make lock writes it anew")
        if reason := refused(chosen.lock):
            raise ValueError(f"{chosen.lock} was not checked: {reason}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USAGE
    for service in chosen.service or SERVICES:
        own = ("--osv-url", chosen.osv_url) if service == "osv" and chosen.osv_url else ()
        answer = answered(chosen.lock, service, *ignored, *own)
        if answer is None:
            continue
        for line in answer.advisories:
            print(f"advisory ({service}): {line}")
        if answer.advisories:
            print(
                f"{len(answer.advisories)} known for what is locked: make lock takes newer "
                f"versions; one that does no harm goes into {ACCEPTED.name} with the reason"
            )
            return FOUND
        if answer.whole:
            print(f"no advisory is known ({service}) for the {len(answer.known)} packages locked")
            return CLEAN
        print(f"not checked ({service} does not know them): {', '.join(answer.unknown)}")
    print("advisories: not reachable: not checked")
    return CLEAN if chosen.where_reachable else NOT_CHECKED


if __name__ == "__main__":
    sys.exit(main())
