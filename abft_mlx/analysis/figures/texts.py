"""Texts in figures: data's own words, such as tokens and class names, made safe to draw."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

NO_GLYPH = "□"
_VISIBLE = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def plain(text: str) -> str:
    """A text as matplotlib draws it letter by letter, in one line.

    Line ends and tabs are written as in Python; another character that cannot be seen, or that the
    font lacks, becomes a box; a dollar sign begins no formula.

    Args:
        text: any string.
    """
    glyphs = _glyphs(_font())
    drawn = []
    for letter in text:
        if letter in _VISIBLE:
            drawn.append(_VISIBLE[letter])
        elif unicodedata.category(letter) in _HIDDEN or ord(letter) not in glyphs:
            drawn.append(NO_GLYPH)
        else:
            drawn.append(letter)
    return "".join(drawn).replace("$", r"\$")


def short(text: str, letters: int) -> str:
    """A text with its middle left out where it is longer than so many letters, safe to draw."""
    if len(text) > letters:
        end = (letters - 1) // 3
        text = f"{text[: letters - 1 - end]}…{text[len(text) - end :]}"
    return plain(text)


def name(text: str, letters: int = 40) -> str:
    """The name of a series; matplotlib would leave one that begins with _ out of the legend."""
    shown = short(text, letters)
    return f" {shown}" if shown.startswith("_") else shown


def token(text: str, letters: int = 14) -> str:
    """A token's text on an axis: without blanks around it, or in quotes where it is all blank."""
    shown = text.strip(" ")
    return short(shown, letters) if shown else f'"{text[: letters - 2]}"'


def _font() -> str:
    from matplotlib.font_manager import FontProperties, findfont

    return str(findfont(FontProperties()))


@cache
def _glyphs(font: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    face: Any = get_font(font)
    return frozenset(face.get_charmap())
