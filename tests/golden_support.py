"""What the golden tests share: a lossless tokenizer, hashes, tasks of the real texts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abft_mlx import data, recipe
from abft_mlx.evaluation.protocols import templates
from abft_mlx.task import Task, open_task

# The benchmark's own label words, where the paper prints others.
STAICC_LABELS = {"subjective": ['data.labels=["false", "true"]']}
_FIRST_WORD = 0x10FF00


class Characters:
    """A token for each character, and one for each label word behind a label prefix."""

    def __init__(self, prefixes: Sequence[str], words: Sequence[str]) -> None:
        self.words = [f" {word}" for word in words]
        before = "|".join(map(re.escape, prefixes))
        behind = "|".join(map(re.escape, sorted(self.words, key=len, reverse=True)))
        self.pattern = re.compile(f"({before})({behind})")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [*map(ord, self.pattern.sub(self._join, text))]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i - _FIRST_WORD] if i >= _FIRST_WORD else chr(i) for i in ids)

    def _join(self, found: re.Match[str]) -> str:
        return found[1] + chr(_FIRST_WORD + self.words.index(found[2]))


def sha256(value: object) -> str:
    """As the golden file has it: of compact JSON in UTF-8."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def golden(shared: Path) -> dict[str, Any]:
    """The golden values, set by set."""
    return json.loads((shared / "reference" / "staicc_reference.json").read_text())


def staicc_task(name: str, shared: Path) -> tuple[recipe.Recipe, Task]:
    """A shipped recipe on the real texts with StaICC's label words."""
    source = shared / "data" / f"{name}.jsonl"
    one = recipe.load(name, [f"data.source={source}", *STAICC_LABELS.get(name, [])])
    section = recipe.task(one)
    texts = data.load(section.data)
    prefixes = sorted({template.label_prefix for template in templates(section)})
    return one, open_task(section, texts, Characters(prefixes, texts.names))
