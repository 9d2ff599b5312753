"""Regular expressions out of adapters from elsewhere, of which some would be matched for years."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

LONGEST_PATTERN = 2000
# Four loops one behind the other end in 490,000 ways on a layer's name, some 60 characters, which
# takes milliseconds: 27 ways for each of them.
LOOP = 27
MOST_WAYS = 1_000_000
_TOKEN = re.compile(
    r"(?P<flags>\(\?[a-z-]*\))|(?P<open>\((?:\?(?:P<\w+>|<?[=!]|[a-z-]*:|>))?)|(?P<close>\))"
    r"|(?P<either>\|)|(?P<repeat>(?:[*+?]|\{[0-9]*,?[0-9]*\})[?+]?)|(?P<atom>.)",
    re.DOTALL,
)


def checked(pattern: str) -> str:
    """A pattern that can be tried on every layer's name in little time.

    Raises:
        ValueError: it is too long, could be matched in too many ways, refers back, or is written
            in a way that hides how much it loops.
        re.error: it is no regular expression.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters")
    try:
        re.compile(pattern)
    except RecursionError as error:
        raise ValueError("a pattern with too many groups within groups") from error
    if re.search(r"\\[1-9]|\(\?P=|\(\?\(", pattern):
        raise ValueError("a pattern that refers to its own groups")
    if re.search(r"\(\?(#|[a-z-]*x)", pattern):
        raise ValueError("a pattern with comments")
    if _ways(pattern) > MOST_WAYS:
        raise ValueError("a pattern with too many loops or choices, or such within loops")
    return pattern


def checked_together(patterns: Iterable[str]) -> list[str]:
    """Patterns of which one after the other is tried on every layer's name.

    Raises:
        ValueError: one of them is refused by :func:`checked`, or all take too long together.
        re.error: one is no regular expression.
    """
    found = [checked(one) for one in patterns]
    if sum(_ways(one) for one in found) > MOST_WAYS:
        raise ValueError("patterns with too many loops or choices together")
    return found


@dataclass
class _Group:
    """A group that is being read.

    Attributes:
        starts: of each alternative, the letters that it must begin with.
        more: whether the next letter belongs to those of the last alternative.
        others: ways through each of the alternatives before this one.
        before: ways through this one, its last item left out.
        item: ways through its last item.
    """

    starts: list[str] = field(default_factory=lambda: [""])
    more: bool = True
    others: list[int] = field(default_factory=list)
    before: int = 1
    item: int = 1

    def add(self, ways: int, letter: str = "") -> None:
        self.before, self.item = self.before * self.item, ways
        self.more = self.more and re.fullmatch(r"[a-zA-Z0-9_]", letter) is not None
        if self.more:
            self.starts[-1] += letter.lower()

    def repeat(self, token: str) -> None:
        if self.more and token[0] != "+":
            self.starts[-1] = self.starts[-1][:-1]
        self.more = False
        if token[0] == "?":
            self.item += 1
        else:
            self.item = LOOP if self.item == 1 else MOST_WAYS + 1

    def close_alternative(self) -> None:
        self.others.append(self.before * self.item)
        self.starts.append("")
        self.before, self.item, self.more = 1, 1, True

    def ways(self) -> int:
        """Through all of it: of alternatives that begin differently, no two fit one name."""
        every = [*self.others, self.before * self.item]
        starts = sorted(self.starts)
        # What begins with another one stands behind it, or behind one that does so, too.
        alike = any(two.startswith(one) for one, two in pairwise(starts))
        return sum(every) if alike else max(every)


def _ways(pattern: str) -> int:
    """At most how many ways of matching a layer's name there are to try, loops taken as LOOP."""
    # Escapes and sets are one character each, which may be any.
    plain = re.sub(r"\\.", ".", pattern)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", ".", plain)
    groups = [_Group()]
    for token in _TOKEN.finditer(plain):
        if token["open"]:
            groups.append(_Group())
        elif token["either"]:
            groups[-1].close_alternative()
        elif token["close"]:
            ways = groups.pop().ways()
            groups[-1].add(ways)
        elif token["repeat"]:
            groups[-1].repeat(token["repeat"])
        elif token["atom"]:
            groups[-1].add(1, token["atom"])
    return groups[0].ways()
