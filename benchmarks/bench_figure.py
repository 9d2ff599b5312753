"""The table and the two figures of a sweep of ``abft-mlx bench``, from its JSON.

    abft-mlx bench --output bench.json
    python benchmarks/bench_figure.py bench.json

prints a Markdown table of every size and draws what a prompt costs against its length, in seconds
and in bytes of memory beside the weights. Needs the extra ``plots``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style
from abft_mlx.analysis.figures.lines import line

MEBIBYTE = 2**20
Sizes = Sequence[dict[str, Any]]


def in_words(size: dict[str, Any]) -> str:
    """A size as the bench reads it."""
    return (
        f"{size['layers']}x{size['width']}x{size['vocabulary']}:"
        f"{size['prompts']}x{size['tokens']}k{size['demonstrations']}"
    )


def table(sizes: Sizes) -> str:
    """Seconds and peak MiB of every contender at every size, in Markdown."""
    names = [row["name"] for row in sizes[0]["rows"]]
    lines = ["| size | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for size in sizes:
        rows = {row["name"]: row for row in size["rows"]}
        cells = [_cell(rows.get(name)) for name in names]
        lines.append(f"| {in_words(size)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    peak = row["peak_memory_bytes"]
    return f"{row['seconds']:.3g}" + ("" if peak is None else f" / {peak / MEBIBYTE:,.0f}")


def by_length(sizes: Sizes) -> list[dict[str, Any]]:
    """The sizes whose batches hold equally many tokens in prompts of different lengths, ordered.

    Raises:
        ValueError: fewer than three are.
    """
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for one in sizes:
        names = ("layers", "width", "vocabulary", "demonstrations")
        key = (*(one[name] for name in names), one["prompts"] * one["tokens"])
        groups.setdefault(key, []).append(one)
    longest = max(groups.values(), key=len)
    if len(longest) < 3:
        raise ValueError("no three sizes differ in nothing but the length of their prompts")
    return sorted(longest, key=lambda one: one["tokens"])


def series(sizes: Sizes, name: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Lengths (X,) and what a prompt costs (X,): milliseconds, or MiB beside the weights."""
    points = []
    for size in sizes:
        rows = {row["name"]: row for row in size["rows"]}
        row, weights = rows[name], rows["limit"]["peak_memory_bytes"]
        if quantity == "seconds":
            points.append((size["tokens"], 1000 * row["seconds"] / size["prompts"]))
        elif row["peak_memory_bytes"] is not None and row["peak_memory_bytes"] > weights:
            beside = (row["peak_memory_bytes"] - weights) / MEBIBYTE
            points.append((size["tokens"], beside / size["prompts"]))
    lengths, values = zip(*points, strict=True) if points else ((), ())
    return np.array(lengths), np.array(values)


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Both figures.

    Args:
        document: the bench JSON of a sweep.
        folder: where they go.

    Returns:
        The files written.
    """
    sizes = by_length(document["sizes"])
    one = sizes[0]
    caption = (
        f"{one['layers']} layers x {one['width']}, vocabulary {one['vocabulary']}, k = "
        f"{one['demonstrations']}, {one['prompts'] * one['tokens']} tokens a batch, "
        f"{document['dtype']}; {document['device']}; medians of an update"
    )
    written: list[Path] = []
    for quantity, label in (
        ("seconds", "milliseconds a prompt"),
        ("memory", "MiB a prompt, beside the weights"),
    ):

        def axes_of(axes: Any, quantity: str = quantity, label: str = label) -> Any:
            for index, row in enumerate(one["rows"]):
                if quantity == "memory" and row["name"] == "limit":
                    continue
                x, y = series(sizes, row["name"], quantity)
                line(axes, index, x, y, None, None, row["name"])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("tokens of a prompt")
            axes.set_ylabel(label)
            style.legend(axes)
            return axes

        written += style.write(folder / f"bench-{quantity}", axes_of, caption)
    return written


def main() -> None:
    """Read the file, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bench", type=Path, help="JSON of abft-mlx bench")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"), help="folder")
    arguments = parser.parse_args()
    lacking = style.missing()
    try:
        document = json.loads(arguments.bench.read_text(encoding="utf-8"))
        print(table(document["sizes"]))
        if lacking:
            print(lacking, file=sys.stderr)
            return
        arguments.figures.mkdir(parents=True, exist_ok=True)
        for path in draw(document, arguments.figures):
            print(f"wrote {path}", file=sys.stderr)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {arguments.bench}: {error}; give it the JSON of a sweep", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
