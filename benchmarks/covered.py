"""What coverage.py counted, by room, and whether it is enough: lines and branches, each by itself.

    make test ARGS="--cov --cov-report=json:build/coverage.json"
    python benchmarks/covered.py build/coverage.json

The exit status is 1 below --least of the lines or of the branches, 2 without a report. What runs in
processes that the tests start is not counted; what counts as code is said in pyproject.toml.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")


def rooms(document: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The counts of each room of the package, in alphabetical order."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    for name, file in document["files"].items():
        room = Path(name).parts[1].removesuffix(".py")
        for key in COUNTS:
            found[room][key] += file["summary"][key]
    return dict(sorted(found.items()))


def shares(counts: dict[str, int]) -> tuple[float, float]:
    """Lines and branches that ran, in percent; 100 where there are none."""
    lines, ran, branches, taken = (counts[key] for key in COUNTS)
    return 100 * ran / lines if lines else 100.0, 100 * taken / branches if branches else 100.0


def table(found: dict[str, dict[str, int]]) -> str:
    """A row for each room, and one for all."""
    whole = {key: sum(one[key] for one in found.values()) for key in COUNTS}
    rows = ["| room | lines | run | branches | taken |", "|---|---:|---:|---:|---:|"]
    for name, counts in {**found, "all": whole}.items():
        lines, branches = shares(counts)
        rows.append(
            f"| {name} | {counts['num_statements']:,} | {lines:.1f}% | "
            f"{counts['num_branches']:,} | {branches:.1f}% |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what --cov-report=json: wrote")
    parser.add_argument("--least", type=float, default=90.0, help="percent")
    parser.add_argument("-q", "--quiet", action="store_true", help="say only what is too little")
    asked = parser.parse_args()
    try:
        document = json.loads(asked.report.read_text(encoding="utf-8"))
        found, totals = rooms(document), document["totals"]
        if not totals["num_statements"]:
            raise ValueError("no line was counted")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        print(f"error: {asked.report}: no report of coverage.py ({error})", file=sys.stderr)
        return 2
    if not asked.quiet:
        print(table(found))
    lines, branches = shares(totals)
    if min(lines, branches) >= asked.least:
        return 0
    print(
        f"error: the tests run {lines:.1f}% of the lines and {branches:.1f}% of the branches; "
        f"{asked.least:g}% of each is asked for",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
