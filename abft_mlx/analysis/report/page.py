"""The page around the sections: one HTML file that asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from abft_mlx import __version__
from abft_mlx.analysis.report.html import Markup, element, escape, join

GENERATOR = "abft-mlx report"
_FOLDER = "abft_mlx.analysis.report"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: its anchor.
        title: its heading, also in the list of contents.
        content: its HTML.
    """

    key: str
    title: str
    content: Markup


@dataclass
class Data:
    """What the page's script reads.

    Attributes:
        charts: numbers of the charts, in the order of the page.
        heads: of the attention panel.
    """

    charts: list[dict[str, Any]] = field(default_factory=list)
    heads: dict[str, Any] | None = None

    def chart(self, drawn: tuple[Markup, dict[str, Any]]) -> Markup:
        """Keep a chart's numbers and give its figure back."""
        figure, numbers = drawn
        self.charts.append(numbers)
        return figure


def anchor(title: str) -> str:
    """A heading as the name of a place in the page."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def part(name: str) -> str:
    """A file that lies beside this module, with plain line ends."""
    found = resources.files(_FOLDER).joinpath(name).read_text(encoding="utf-8")
    return found.replace("\r\n", "\n")


def embedded(data: Data) -> Markup:
    """The numbers as JSON which no text in it can end."""
    content = json.dumps(
        {"charts": data.charts, "heads": data.heads}, separators=(",", ":"), allow_nan=False
    )
    for character in "<>&":
        content = content.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="report-data">{content}</script>')


def page(title: str, lead: Markup, sections: Sequence[Section], data: Data) -> str:
    """The whole file.

    Args:
        title: its heading.
        lead: what stands under it.
        sections: in order.
        data: for the script.
    """
    style, script = part("style.css"), part("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    # Nothing is fetched from anywhere, and of all scripts only this file's own runs.
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content=GENERATOR),
        element("title", title),
        Markup(f"<style>{style}</style>"),
    )
    contents = element(
        "nav",
        element(
            "ul",
            *(element("li", element("a", one.title, href=f"#{one.key}")) for one in sections),
        ),
        aria_label="Contents",
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", title), lead),
        contents,
        element(
            "main",
            *(
                element(
                    "section",
                    element("h2", one.title, id=f"{one.key}-title"),
                    one.content,
                    id=one.key,
                    aria_labelledby=f"{one.key}-title",
                )
                for one in sections
            ),
            id="content",
            tabindex="-1",
        ),
        element(
            "footer",
            element(
                "p", f"Made by abft-mlx {__version__} with ", element("code", "abft-mlx report"),
                ". This file asks the network for nothing.",
            ),
        ),
        embedded(data),
        Markup(f"<script>{script}</script>"),
    )  # fmt: skip
    html = element("html", join("\n", head, "\n", body, "\n"), lang="en")
    return f"<!doctype html>\n{html}\n"


def notes(lines: Sequence[Any]) -> Markup | None:
    """What is missing and how to get it."""
    if not lines:
        return None
    return element(
        "ul", *(element("li", escape(one)) for one in lines), class_="missing"
    )  # fmt: skip
