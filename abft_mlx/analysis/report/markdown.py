"""The tables of a study, which are written as Markdown, as HTML sections."""

from __future__ import annotations

import re
from collections.abc import Iterator

from abft_mlx.analysis.report.html import Markup, element, join, table
from abft_mlx.analysis.report.page import Section, anchor


def sections(text: str) -> tuple[list[Markup], list[Section]]:
    """What stands before the first heading of the second rank, and a section for each of these.

    Args:
        text: headings, paragraphs and tables, as ``table.md`` has them; the first line is the
            title, which is left out.
    """
    lead: list[Markup] = []
    made: list[tuple[str, list[Markup]]] = []
    for block in _blocks(text):
        if block.startswith("## "):
            made.append((block[3:], []))
        elif not block.startswith("# "):
            title = made[-1][0] if made else None
            (made[-1][1] if made else lead).append(_block(block, title))
    return lead, [Section(anchor(title), title, join(*parts)) for title, parts in made]


def _blocks(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        if block.strip():
            yield block.strip("\n")


def _block(block: str, title: str | None) -> Markup:
    lines = block.split("\n")
    if len(lines) > 1 and lines[0].startswith("| ") and re.fullmatch(r"\|(---\|)+", lines[1]):
        rows = [_cells(line) for line in (lines[0], *lines[2:])]
        return table(rows[0], rows[1:], name=title or "table")
    return element("p", block)


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [one.strip().replace("\\|", "|") for one in cells]
