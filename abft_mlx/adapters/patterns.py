"""Regular expressions out of adapters from elsewhere, of which some would be matched for years."""

from __future__ import annotations

import re

LONGEST_PATTERN = 2000
# On names of layers, some 60 characters: four loops one behind the other take milliseconds.
MOST_LOOPS = 4


def checked(pattern: str) -> str:
    """A pattern that can be tried on every layer's name in little time.

    Raises:
        ValueError: it is too long, loops over what loops itself, loops too often in one
            alternative, or refers back.
        re.error: it is no regular expression.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters")
    if _loops(pattern) > MOST_LOOPS:
        raise ValueError("a pattern with too many loops, or loops within loops")
    if re.search(r"\\[1-9]|\(\?P=|\(\?\(", pattern):
        raise ValueError("a pattern that refers to its own groups")
    return re.compile(pattern).pattern


def _loops(pattern: str) -> int:
    """The most loops one behind the other; one that holds another counts as too many."""
    plain = re.sub(r"\\.", "a", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "a", plain)
    # For each open group: loops of its alternatives before this one, and of this one.
    open_groups: list[list[int]] = [[0, 0]]
    last = 0
    for at, one in enumerate(plain):
        repeats = re.match(r"[*+]|\{\d*,?\d*\}", plain[at:])
        if one == "(":
            open_groups.append([0, 0])
        elif one == "|":
            most, now = open_groups[-1]
            open_groups[-1] = [max(most, now), 0]
        elif one == ")" and len(open_groups) > 1:
            last = max(open_groups.pop())
            open_groups[-1][1] += last
        elif repeats and at and plain[at - 1] == ")" and last:
            return MOST_LOOPS + 1
        elif repeats and at and plain[at - 1] not in "*+}?":
            open_groups[-1][1] += 1
    return max(max(one) for one in open_groups)
