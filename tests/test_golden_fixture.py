"""The protocol's draws against committed hashes, wherever the project is: no ../shared is needed.

A constant that is changed anywhere shows here. What StaICC's own values can be compared with is
compared with them where they are at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden_fixture
import pytest
from golden_support import golden, sha256
from paper_sets import SETS

HASHES = json.loads((Path(__file__).parent / "golden_hashes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", golden_fixture.PARTS)
def test_generated_rows_give_the_committed_hashes(part: str) -> None:
    assert golden_fixture.PARTS[part]() == HASHES[part]


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
