"""How many of mutmut's mutants the tests kill, package by package.

    make mutants                                    # tries them all, then prints this
    python benchmarks/mutants.py                    # prints it again, of the results that are there

A mutant is killed if a test fails with it, or if its tests take many times as long as without it.
All others count against the share: those that no test notices, those that no test reaches, those
whose tests could not be run, and those that were not tried. Packages of which none was tried are
only named. The exit status is 1 where a share is below LEAST.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST = 0.85
KINDS = ("killed", "timeout", "survived", "no tests", "other", "untried")
# What mutmut 3.8 writes: pytest's exit status, a signal, or a number of its own. It calls 255 a
# timeout, too, but that is how a run ends whose tests could not be started.
KIND_OF = {
    1: "killed", 3: "killed", -24: "timeout", 24: "timeout", 36: "timeout", 152: "timeout",
    0: "survived", 5: "no tests", 33: "no tests", None: "untried",
}  # fmt: skip


def counted(folder: Path, package: str = "abft_mlx") -> dict[str, Counter[str]]:
    """Mutants of every room, by how they ended.

    Args:
        folder: mutmut's, with a ``.meta`` beside each file that it changed.
        package: whose rooms are counted: its folders and files.

    Raises:
        ValueError: a file is none of mutmut's.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for path in sorted((folder / package).rglob("*.py.meta")):
        try:
            codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].values()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: is no result of mutmut ({error!r})") from error
        room = path.relative_to(folder / package).parts[0].removesuffix(".py.meta")
        found[room].update(KIND_OF.get(code, "other") for code in codes)
    return {room: kinds for room, kinds in found.items() if kinds.total()}


def share(kinds: Mapping[str, int]) -> float:
    """Killed mutants, those that ran out of time among them, over all: 0..1."""
    return (kinds["killed"] + kinds["timeout"]) / sum(kinds.values())


def table(found: Mapping[str, Mapping[str, int]]) -> str:
    """A table in Markdown, a row for every room of which a mutant was tried."""
    lines = [f"| package | mutants | {' | '.join(KINDS)} | share |", "|---" * 9 + "|"]
    for room, kinds in found.items():
        numbers = [sum(kinds.values()), *(kinds[kind] for kind in KINDS)]
        lines.append(f"| {room} | {' | '.join(map(str, numbers))} | {share(kinds):.1%} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "mutants", help="mutmut's results")
    folder = parser.parse_args(arguments).folder
    try:
        found = counted(folder)
    except ValueError as error:
        print(f"error: {error}; delete {folder} and run make mutants again", file=sys.stderr)
        return 2
    tried = {room: kinds for room, kinds in found.items() if kinds["untried"] < kinds.total()}
    if not tried:
        print(f"error: {folder} holds no results of mutmut; run make mutants", file=sys.stderr)
        return 2
    print(table(tried))
    if others := sorted(set(found) - set(tried)):
        print(f"untried: {', '.join(others)}")
    low = [room for room, kinds in tried.items() if share(kinds) < LEAST]
    if low:
        print(f"below {LEAST:.0%}: {', '.join(low)}; mutmut results names those left")
    return 1 if low else 0


if __name__ == "__main__":
    raise SystemExit(main())
