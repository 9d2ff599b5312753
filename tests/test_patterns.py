"""Patterns out of adapters: those that real ones have are taken, those without end are refused."""

from __future__ import annotations

import re

import pytest

from abft_mlx.adapters.patterns import checked, checked_together

WAYS = "a pattern with too many loops or choices, or such within loops"
OWN = "a pattern that refers to its own groups"
HIDDEN = "a pattern with comments"


@pytest.mark.parametrize("pattern", [
    r".*\.(q_proj|k_proj)$", r"model\.layers\.(0|1|2)\.self_attn\.q_proj", "q_proj",
    r"^(?:.*layers\.\d+\.self_attn)\.(q|k)_proj", r".*\.layers\.[0-9]+\.(self_attn|mlp)\..*",
    r"^(?!.*(?:visual|patch_embed)).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention).*?(?:q_proj|k_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|k_proj)))",
    # As of adapters that leave out, or take in, all of a model that sees.
    r"(?:.*?(?:vision|visual|image|patch|text).*?(?:self_attn|attention|attn|mlp|ffn|feed_forward)"
    r".*?(?:q_proj|qkv|k_proj|out_proj|o_proj|linear_fc1|linear_fc2|gate_proj|up_proj).*?)",
    "a" * 2000, "",
])  # fmt: skip
def test_those_of_real_adapters_are_taken(pattern: str) -> None:
    assert checked(pattern) == pattern


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a" * 2001, "a pattern of 2001 characters"),
        ("(" * 990 + ")" * 990, "a pattern with too many groups within groups"),
        (r"(a)\1", OWN),
        (r"(a)(?(1)b)", OWN),
        (r"(?P<n>a)(?P=n)", OWN),
        ("(a+)(?#)*", HIDDEN),
        ("(?x)(a+) *", HIDDEN),
        ("(?i-x:a)", HIDDEN),
        *(
            (pattern, WAYS)
            for pattern in (
                r"(a+)+$", r"(.*)*x", r"((?:a|b)+c)*", r"(\w+\.){5}x", r"(x+x+)+y", r"([a-z]+)*",
                # Choices that fit one name in two ways, over and over again.
                "(.|.)*x", "(a|aa)*b", "(a?)*", "(a?a?)*", "(|a)+", "(?i:a|A)*", "(a|b?a)*",
                "(a*|b)*", r"(a|\w)*", "(a|[ab]){9}", "(a?b|b)*", "((a|.)b)*", "(a|B|c|b)*",
            )
        ),
    ],
)  # fmt: skip
def test_those_without_end_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checked(pattern)


@pytest.mark.parametrize("pattern", ["(", "a)", "*a", "[a"])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(re.error):
        checked(pattern)


@pytest.mark.parametrize(
    ("part", "most"),
    [
        # Loops, each of them 27 ways, of a million.
        ("a*", 4),
        ("a+", 4),
        ("a{2}", 4),
        ("a{,3}", 4),
        ("a{1,}x", 4),
        ("a*?", 4),
        (r"\w+\.", 4),
        ("[^]*+]+", 4),
        ("[]*+]*b", 4),
        ("(ab)*", 4),
        ("(?:a|b)+", 4),
        ("(?P<n{}>a+)", 4),
        ("(?=a*)", 4),
        # Choices, two ways or three.
        ("a?", 19),
        ("a??b", 19),
        ("(ab)?", 19),
        ("(a|.)", 19),
        ("(.|^b)", 19),
        ("(ab|abc)", 19),
        ("(a.|ab)", 19),
        ("(xy|aB|Ab)", 12),
        ("(?:a|A)", 19),
        ("(a|bc|ad)", 12),
        ("(a|(b|.))", 12),
        ("(?:b?)?", 12),
        # Beginnings that may be left out do not tell alternatives apart.
        ("(a?x|b?x|c?x)", 7),
        ("(a?x|x)", 12),
        ("(ab?c|ad)", 12),
        ("(abx|aby?)", 12),
        ("(ab+|abc)", 4),
        ("(a+x|b+x|c+x)", 4),
        ("(ax?|bx?|cx?)", 19),
        # Two and 27, in one alternative or the other or both.
        ("(.a?|.b*)", 4),
        ("(a*b|c)", 4),
        # No choice at all.
        ("(a|B|_c|3)", 150),
        ("(ab|ac|a_|b)", 150),
        ("(attn|attention|self_attn)", 70),
        ("(a+|b)?c", 4),
        (r"\*\+\?", 150),
        (r"\(\|", 150),
        ("[*+?(|]", 150),
        (r"(?!ab)", 150),
        ("(?i:a|b)", 150),
        ("x{y", 150),
    ],
)
def test_how_much_is_too_much(part: str, most: int) -> None:
    def parts(number: int) -> str:
        return "".join(part.replace("{}", str(n)) for n in range(number))

    assert checked(parts(most)) == parts(most)
    if most < 70:
        with pytest.raises(ValueError, match=WAYS):
            checked(parts(most + 1))


def test_alternatives_add_up_where_both_may_fit() -> None:
    four = "a*b*c*d*"
    assert checked(f"(?:{four}|{four[:-2]})")
    with pytest.raises(ValueError, match=WAYS):
        checked(f"(?:{four}|{four})")
    assert checked(f"(?:x{four}|y{four}|z{four})")
    million = "(.|.|.|.|.)" * 6 + "a?" * 6
    assert checked(million)
    assert checked_together([million]) == [million]
    with pytest.raises(ValueError, match=WAYS):
        checked(f"(?:{million}|b)")


def test_patterns_add_up_where_all_are_tried() -> None:
    many = [f"layers.{n}.q_proj" for n in range(3000)]
    assert checked_together(many) == many
    three = [f"{letter}*b*c*d*" for letter in "xyz"]
    assert checked_together(three[:1] + many) == three[:1] + many
    with pytest.raises(ValueError, match=r"^patterns with too many loops or choices together$"):
        checked_together(three)
    with pytest.raises(ValueError, match=WAYS):
        checked_together(["(a|a)*"])
