"""Damage, drawn from a seed: of bytes, and of values such as JSON and YAML hold."""

from __future__ import annotations

import copy
import gzip
import json
import re
from random import Random
from typing import Any

ATOMS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "a", "0", "-1", "1e5", "nan", "null", "true", "\x00", "\ud800", "\udfff\ud800", "\r\n",
    "\u2028", "\u202e", "😀", "é" * 300, "x" * 70_000, "\x1b[2J\x1b]0;owned\x07",
    "../../../etc/passwd",
    "/etc/passwd", "C:\\x", "<script>alert(1)</script>", "%s%n{0}", "(a+)+$", "*a", "&a",
    "!!python/object",
    [], {}, [[]], [None], [0], ["a", "a"], {"": None}, {"a": {"b": [1, 2]}}, [1, "a", None, {}],
)  # fmt: skip
PIECES = (
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n\n\n", b"\t",
    b'"', b"'", b"{", b"}",
    b"[", b"]", b",", b":", b"- ", b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system ",
    b"%YAML 9.9\n",
    b"--- ", b"|", b"#", b"\\", b"\\ud800", b"NaN", b"Infinity", b"1e999", b"null",
    b"\xed\xa0\x80", b"\xc0\x80",
    b"\x1b[31m", b"\x85", b"\xe2\x80\xa8", b"0x10", b"1_000", b"...", b"? ", b"@", b"`", b"=",
    b"PAR1", b"PK\x03\x04",
)  # fmt: skip
_MOST_BYTES = 4_000_000


def value(rng: Random, given: Any, times: int | None = None) -> Any:
    """A copy of a JSON-like value with a few of its parts damaged."""
    made = copy.deepcopy(given)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        made = _damage(rng, made)
    return made


def _places(whole: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    left = [whole]
    while left:
        one = left.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one)
        for key, inner in items:
            found.append((one, key))
            if isinstance(inner, (dict, list)):
                left.append(inner)
    return found


def _damage(rng: Random, whole: Any) -> Any:
    if not isinstance(whole, (dict, list)) or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(ATOMS))
    places = _places(whole)
    if not places:
        return copy.deepcopy(rng.choice(ATOMS))
    # Half of the time near the top, where what is read is named.
    top = [place for place in places if place[0] is whole]
    holder, key = rng.choice(top if top and rng.random() < 0.3 else places)
    held = holder[key]
    kind = rng.randrange(9)
    if kind <= 2:
        holder[key] = copy.deepcopy(rng.choice(ATOMS))
    elif kind == 3:
        del holder[key]
    elif kind == 4:
        holder[key] = rng.choice(([held], {"a": held}, str(held), [held, held]))
    elif kind == 5 and isinstance(holder, dict):
        holder[rng.choice(("", "a", "é", str(key) + " ", str(key).upper(), "\ud800"))] = held
    elif kind == 6 and isinstance(held, list) and held:
        holder[key] = (held * rng.choice((2, 7, 300)))[:3000]
    elif kind == 7 and isinstance(held, (int, float)) and not isinstance(held, bool):
        holder[key] = rng.choice((-held, held + 1, held * 10**9, str(held), held - 0.5, held / 3))
    else:
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other[place]) if other is not holder else held
    return whole


def as_json(rng: Random, given: Any) -> bytes:
    """JSON text of a value, in one of the odd ways in which it can be written."""
    text = json.dumps(given, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, None, 2)))
    if rng.random() < 0.08:
        at = [one.end() for one in re.finditer(r"\{", text[:50_000])]
        keys = re.findall(r'"[^"\\]{1,30}":', text[:50_000])
        if at and keys:
            place = rng.choice(at)
            again = json.dumps(rng.choice(ATOMS))
            text = f"{text[:place]}{rng.choice(keys)} {again}, {text[place:]}"
    if rng.random() < 0.04:
        numbers = list(re.finditer(r"\d+", text[:50_000]))
        if numbers:
            one = rng.choice(numbers)
            text = text[: one.start()] + "9" * rng.choice((20, 400, 6000)) + text[one.end() :]
    if rng.random() < 0.03:
        spots = list(re.finditer(r"(?<=[:\[,] )[\d\"n]", text[:50_000]))
        deep = rng.choice((60, 900, 30_000))
        place = rng.choice(spots).start() if spots else 0
        text = text[:place] + "[" * deep + rng.choice(("", "1" + "]" * deep)) + text[place:]
    return text.encode("utf-8", "surrogatepass")


def octets(rng: Random, content: bytes, times: int | None = None) -> bytes:
    """Damaged bytes: a few changes in a row, or the whole written otherwise."""
    for _ in range(times or rng.choice((1, 1, 2, 3, 6))):
        content = _change(rng, content)
    return content[:_MOST_BYTES]


def _change(rng: Random, content: bytes) -> bytes:
    size = len(content)
    at = rng.randrange(size + 1)
    # Headers stand in front and tables of contents at the end.
    at = rng.choice((at, at, min(at, 16), max(0, size - 1 - rng.randrange(64))))
    to = min(size, at + rng.choice((1, 2, 8, 40, 1000)))
    kind = rng.randrange(13)
    if kind <= 1 and size:
        at = min(at, size - 1)
        return content[:at] + bytes((content[at] ^ (1 << rng.randrange(8)),)) + content[at + 1 :]
    if kind == 2:
        return content[:at]
    if kind == 3:
        return content[:at] + content[to:]
    if kind == 4:
        return content[:at] + rng.choice(PIECES) * rng.choice((1, 1, 2, 50)) + content[at:]
    if kind == 5:
        return content[:at] + content[at:to] * rng.choice((2, 3, 100)) + content[to:]
    if kind == 6:
        return content[:at] + rng.randbytes(rng.choice((1, 4, 8, 64))) + content[to:]
    if kind == 7:
        return re.sub(
            rb"\d+", lambda one: _number(rng, one[0]), content, count=rng.choice((1, 1, 5))
        )
    if kind == 8:
        big = rng.choice((2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1, 10**15))
        return content[:at] + big.to_bytes(8, rng.choice(("little", "big"))) + content[at + 8 :]
    if kind == 9:
        lines = content.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines)
    if kind == 10:
        return (
            content[:at] + rng.choice((b"[", b"{", b'{"a":', b"(", b"- ")) * 20_000 + content[at:]
        )
    if kind == 11:
        return _whole(rng, content)
    other = rng.randrange(size + 1)
    return content[:at] + content[other : other + (to - at)] + content[to:]


def _number(rng: Random, held: bytes) -> bytes:
    return rng.choice(
        (b"-" + held, held + b"0" * 12, b"9" * 5000, b"0", b"1e999", held + b".5", b".")
    )


def _whole(rng: Random, content: bytes) -> bytes:
    kind = rng.randrange(9)
    if kind == 0:
        return b"\xef\xbb\xbf" + content
    if kind == 1:
        return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"\x00\n", b"")))
    if kind == 2:
        return content.decode("latin-1").encode("utf-16" if rng.random() < 0.5 else "utf-16-be")
    if kind == 3:
        return gzip.compress(content, 1)
    if kind == 4:
        return b""
    if kind == 5:
        return b" \n\t" * rng.choice((1, 10_000))
    if kind == 6:
        return rng.randbytes(rng.choice((1, 7, 9, 300)))
    if kind == 7:
        return content * rng.choice((2, 20)) if len(content) < 100_000 else content
    return content.replace(b" ", b"\t", rng.choice((1, 10)))
