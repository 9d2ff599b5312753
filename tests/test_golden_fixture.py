"""The protocol's draws against committed hashes, wherever the project is: no ../shared is needed.

A constant that is changed anywhere shows here. What StaICC's own values can be compared with is
compared with them where they are at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden_fixture
import pytest
from golden_support import golden, sha256
from paper_sets import SETS

from abft_mlx import data, recipe
from abft_mlx.evaluation import bias, methods, robustness, unseen

HASHES = json.loads((Path(__file__).parent / "golden_hashes.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No task of an earlier test, made while a constant was another."""
    golden_fixture.made_task.cache_clear()
    yield
    golden_fixture.made_task.cache_clear()


@pytest.mark.parametrize("part", golden_fixture.PARTS)
def test_generated_rows_give_the_committed_hashes(part: str) -> None:
    assert golden_fixture.PARTS[part]() == HASHES[part]


def test_the_fixture_holds_nothing_else() -> None:
    assert HASHES.keys() == golden_fixture.PARTS.keys()


def test_splits_samplers_and_templates_are_staiccs_own(shared: Path) -> None:
    reference = golden(shared)
    levels = json.loads((shared / "data" / "datasets.json").read_text())
    parts = {"training": "calibration", "demonstrations": "demonstration", "test": "test"}
    for name in SETS:
        wanted = reference[name]
        for part, key in parts.items():
            found = HASHES["splits"][name][part]
            assert found == wanted[key]["sha256_of_compact_json_index_list"]
        pool = str(wanted["split_sizes"]["demonstration"])
        assert HASHES["samplers"][pool] == wanted["demo_sampler_k4"]["sha256"]
        assert golden_fixture.ROWS[name] == levels[name]["size"]
        assert HASHES["templates"][name] == sha256(_benchmarks(levels, name))


def _benchmarks(facts: dict[str, Any], name: str) -> list[list[str]]:
    """The nine templates in the order of our pieces, from StaICC's levels."""
    prompt, levels = facts[name]["prompt"], facts[name]["template_sensitivity_levels"]
    design = facts["_about"]["template_sensitivity"]
    made = []
    for row in design["L9_rows"]:
        chosen = {f: levels[f][i] for f, i in zip(design["factor_order"], row, strict=True)}
        pieces = prompt | chosen
        pieces["label_prefix"] = pieces["label_prefix"].removesuffix(" ")
        order = ("instruction", "input_prefix", "input_affix", "label_prefix", "label_affix")
        made.append([pieces[piece] for piece in (*order, "query_prefix")])
    return made


Patch = Callable[[pytest.MonkeyPatch], None]


def constant(module: object, name: str, value: object) -> Patch:
    return lambda patch: patch.setattr(module, name, value)


def setting(change: str) -> Patch:
    """Every recipe loaded with one setting changed."""
    load = recipe.load
    return lambda patch: patch.setattr(recipe, "load", lambda name: load(name, [change]))


L9_SWAPPED = (*robustness.L9[:7], robustness.L9[8], robustness.L9[7])
GENERATOR = data.sampling
CHANGES: dict[str, tuple[str, Patch]] = {
    "multiplier": ("generator", constant(GENERATOR, "_MULTIPLIER", 1664526)),
    "increment": ("generator", constant(GENERATOR, "_INCREMENT", 1013904222)),
    "modulus": ("generator", constant(GENERATOR, "_MODULUS", 2**31)),
    "training rows": ("splits", setting("data.training_rows=1023")),
    "demonstration rows": ("splits", setting("data.demonstration_rows=4095")),
    "test rows": ("splits", setting("data.test_rows=511")),
    "validation rows": ("splits", setting("data.validation_rows=1")),
    "seed of the splits": ("splits", setting("data.seed=43")),
    "seed of the demonstrations": ("test prompts", setting("evaluation.seed=43")),
    "queries": ("test prompts", setting("evaluation.queries=511")),
    "repeats": ("test prompts", setting("evaluation.repeats=1")),
    "demonstrations": ("test prompts", setting("prompt.demonstrations=3")),
    "a level": ("templates", setting('variants.label_affix=["  ", "\\t"]')),
    "a piece": ("templates", setting("prompt.input_affix=")),
    "order of the factors": (
        "templates",
        constant(robustness, "FACTORS", robustness.FACTORS[::-1]),
    ),
    "two rows of L9": ("templates", constant(robustness, "L9", L9_SWAPPED)),
    "queries of the templates": ("test prompts", constant(robustness, "TEMPLATE_QUERIES", 99)),
    "queries of the sets": ("test prompts", constant(robustness, "QUERIES", 127)),
    "sets": ("test prompts", constant(robustness, "SETS", 7)),
    "when unseen rows are drawn elsewhere": (
        "unseen rows",
        constant(unseen, "LONGEST_SEARCH", 2),
    ),
    "words of a domain query": ("bias prompts", constant(bias, "WORDS", 127)),
    "rates": ("bias prompts", constant(bias, "RATES", (0.0, 0.25, 0.75, 0.5, 1.0))),
    "words of domain calibration": (
        "calibration prompts",
        constant(methods, "DOMAIN_WORDS", 63),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_constant_shows(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, apply = CHANGES[change]
    apply(monkeypatch)
    assert golden_fixture.PARTS[part]() != HASHES[part]
