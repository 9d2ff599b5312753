"""HTML from values: every text is escaped, and what no reader could see is made visible."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BREAKS = frozenset("\u0085\u2028\u2029\ufeff")
_VOID = frozenset({"meta", "input", "wbr"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


NOTHING = Markup()


def visible(text: Any) -> str:
    """A text without anything that a browser would obey or could not show.

    Control characters, direction marks and odd line ends become their code points in brackets, and
    halves of surrogate pairs the replacement character. Newlines and tabs stay.
    """
    return "".join(map(_visible, str(text)))


def _visible(character: str) -> str:
    code = ord(character)
    if 0x20 <= code < 0x7F or character in "\n\t":
        return character
    if code < 0xA0 or character in _BIDI or character in _BREAKS:
        return f"[U+{code:04X}]"
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else character


def escape(content: Any) -> Markup:
    """Content as HTML: markup as it is, anything else as text."""
    return content if isinstance(content, Markup) else Markup(html.escape(visible(content)))


def join(*content: Any, between: str = "") -> Markup:
    """Pieces one behind the other; None is left out."""
    return Markup(between.join(escape(one) for one in content if one is not None))


def element(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        name: of the element.
        content: texts, which are escaped, and markup; None is left out.
        attributes: ``class_`` is class, underscores are hyphens; True stands alone, False and None
            are left out.
    """
    parts = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(*content)}</{name}>")


def table(
    header: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    *,
    caption: Any = None,
    name: str = "table",
) -> Markup:
    """A table in a box that scrolls sideways by itself, its first column the rows' headings.

    Columns of numbers are set to the right.

    Args:
        header: of each column.
        rows: as long as the header.
        caption: above it, also the name of the box.
        name: of the box where there is no caption.
    """
    words = [
        "words" if any(_words(row[n]) for row in rows) else None for n in range(len(header))
    ]  # fmt: skip
    head = [
        element("th", breakable(one), scope="col", class_=kind)
        for one, kind in zip(header, words, strict=True)
    ]
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(
                element("td", one, class_=kind)
                for one, kind in zip(row[1:], words[1:], strict=True)
            ),
        )
        for row in rows
    ]
    made = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *lines),
        class_="numeric",
    )
    return titled(made, caption) if caption is not None else scrolling(made, name)


def breakable(content: Any) -> Markup:
    """A heading that may break behind slashes and underscores."""
    if isinstance(content, Markup):
        return content
    return Markup(re.sub(r"([/_.])(?=\w)", r"\1<wbr>", escape(content)))


def _words(cell: Any) -> bool:
    """Whether a cell holds words rather than a number, a picture, or nothing."""
    return re.match(r"\s*([-+−–<]|\d|&lt;)|$", str(cell)) is None


def titled(content: Markup, caption: Any) -> Markup:
    """A box that scrolls sideways, and its caption, which does not."""
    return join(element("p", caption, class_="caption"), scrolling(content, caption))


def scrolling(content: Markup, name: Any) -> Markup:
    """A box that scrolls sideways, which the keyboard reaches."""
    return element("div", content, class_="wide", tabindex="0", role="region", aria_label=name)
