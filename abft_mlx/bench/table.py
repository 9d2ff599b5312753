"""The bench's results for a person."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from abft_mlx.bench.exponents import Exponent
from abft_mlx.bench.measure import Row
from abft_mlx.bench.sizes import Size

OURS = "ours-exact"


def table(size: Size, rows: Sequence[Row]) -> Table:
    """Seconds, prompts per second and memory, each also as a multiple of our exact step's."""
    drawn = Table(
        box=None,
        pad_edge=False,
        title=(
            f"{size.layers} layers x {size.width}, {size.vocabulary:,} tokens of vocabulary, "
            f"{size.prompts} prompts of {size.tokens} tokens, k = {size.demonstrations}"
        ),
        title_justify="left",
    )
    for heading in ("", "seconds", "range", "prompts/s", "of exact", "peak", "of exact"):
        drawn.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    ours = next((row for row in rows if row.name == OURS), None)
    for row in rows:
        drawn.add_row(
            row.name,
            f"{row.seconds:.3f}",
            f"{row.fastest_seconds:.2f}–{row.slowest_seconds:.2f}",
            f"{row.examples_per_second:.2f}",
            _time(row, ours),
            "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:,.0f} MiB",
            _share(row, ours),
        )
    return drawn


def growth(found: Sequence[Exponent]) -> Table:
    """How each contender's seconds and memory grow."""
    drawn = Table(box=None, pad_edge=False, title="exponents", title_justify="left")
    for heading in ("", "grows as", "to the power of"):
        drawn.add_column(heading, justify="right" if heading.startswith("to") else "left")
    for one in found:
        drawn.add_row(one.contender, f"{one.quantity}, with {one.of}", f"{one.exponent:.2f}")
    return drawn


def _time(row: Row, ours: Row | None) -> str:
    return "–" if ours is None else f"{row.seconds / ours.seconds:.2f}x"


def _share(row: Row, ours: Row | None) -> str:
    if ours is None or not row.peak_memory_bytes or not ours.peak_memory_bytes:
        return "–"
    return f"{row.peak_memory_bytes / ours.peak_memory_bytes:.2f}x"
