"""Every reader of what a user hands over, with whole samples and the ways to damage them.

A reader's ``prepare`` makes its samples once, ``make`` writes the damaged files of one case, and
``read`` reads them as the commands do. It may end well or with a UsageError; nothing else.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations as damage
import yaml

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: in the table.
        share: how many of a whole round's cases are its own.
        prepare: makes samples in a folder.
        make: writes the files of one case into an empty folder.
        read: reads them.
    """

    name: str
    share: int
    prepare: Callable[[Path], Any]
    make: Callable[[Random, Any, Path], None]
    read: Callable[[Any, Path], None]


def every(*calls: Callable[[], object]) -> None:
    """Make all calls; the first expected failure is raised when all are made."""
    from abft_mlx.errors import UsageError

    first: UsageError | None = None
    for call in calls:
        try:
            call()
        except UsageError as error:
            first = first or error
    if first is not None:
        raise first


def _yaml_samples(*patterns: str) -> list[bytes]:
    found = [path for one in patterns for path in sorted((ROOT / "recipes").glob(one))]
    return [path.read_bytes() for path in found]


def yaml_case(rng: Random, samples: list[bytes], path: Path) -> None:
    """Write one of some YAML files, damaged."""
    content = rng.choice(samples)
    if rng.random() < 0.5:
        path.write_bytes(damage.octets(rng, content))
        return
    made = damage.value(rng, yaml.safe_load(content))
    if rng.random() < 0.5:
        path.write_bytes(damage.as_json(rng, made))
    else:
        text = yaml.safe_dump(made, allow_unicode=True, sort_keys=False)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _read_recipe(_samples: Any, folder: Path) -> None:
    from abft_mlx import recipe as recipes

    made = recipes.load(folder / "recipe.yaml")
    recipes.save(made, folder / "saved.yaml")
    again = recipes.load(folder / "saved.yaml")
    assert recipes.dumps(again) == recipes.dumps(made), "a saved recipe is another"


def _overrides(_folder: Path) -> list[str]:
    from abft_mlx import recipe as recipes

    values = yaml.safe_load(recipes.dumps(recipes.load("demo")))
    keys = list(values)
    return keys + [f"{key}.{one}" for key in keys if isinstance(values[key], dict)
                   for one in values[key]]  # fmt: skip


def _override_case(rng: Random, keys: list[str], folder: Path) -> None:
    lines = []
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(keys)
        if rng.random() < 0.1:
            key = rng.choice(
                (key + ".a", "", ".", key.upper(), key + "\x00", "a.b.c.d", "=", key * 3)
            )
        raw = json.dumps(rng.choice(damage.ATOMS))
        kind = rng.randrange(4)
        if kind == 0:
            raw = rng.choice(("[" * 5000, "{a: " * 3000, "&a [*a]", "!!int x", "2001-01-01",
            "- a", "a: b: c",
                              "%", "@", "\x07", "1e999", "9" * 5000, "0x1F", ".nan", "-.inf",
                              "? a", "*x"))  # fmt: skip
        elif kind == 1:
            raw = damage.octets(rng, raw.encode("utf-8", "replace")).decode("utf-8", "replace")[
                :9000
            ]
        lines.append(f"{key}={raw}" if rng.random() < 0.95 else raw)
    (folder / "overrides.json").write_text(json.dumps(lines), encoding="utf-8")


def _read_overrides(_samples: Any, folder: Path) -> None:
    from abft_mlx import recipe as recipes

    lines = json.loads((folder / "overrides.json").read_text(encoding="utf-8"))
    made = recipes.default(lines)
    recipes.save(made, folder / "saved.yaml")


def _read_study(_samples: Any, folder: Path) -> None:
    from abft_mlx import analysis
    from abft_mlx import study as studies

    made = studies.load(folder / "study.yaml")
    analysis.check(made)
    found = studies.cells(made)
    studies.Store(folder / "out").check(found)


_ROWS = [
    {"text": f"the {word} film number {n}, said she", "label": "spam" if n % 2 else "ham", "n": n}
    for n, word in enumerate(("good", "dull", "lovely", "bad", "odd", "new") * 8)
]


def _table(kind: str) -> Callable[[Path], list[bytes]]:
    def prepare(_folder: Path) -> list[bytes]:
        if kind in ("jsonl", "json"):
            lines = "".join(json.dumps(row) + "\n" for row in _ROWS)
            return [(lines if kind == "jsonl" else json.dumps(_ROWS)).encode()]
        if kind == "parquet":
            return _parquets()
        made = []
        for mark in (",", "\t", ";"):
            rows = [f'"{row["text"]}"{mark}{row["label"]}{mark}{row["n"]}' for row in _ROWS]
            made.append("\n".join([f"text{mark}label{mark}n", *rows, ""]).encode())
        return [made[1]] if kind == "tsv" else made

    return prepare


def _parquets() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(_ROWS)
    coded = table.set_column(1, "label", pyarrow.array([n % 2 for n in range(len(_ROWS))]))
    odd = table.set_column(0, "text", pyarrow.array([[1.5]] * len(_ROWS)))
    made = []
    for one, settings in (
        (table, {"compression": "snappy"}), (coded, {"compression": "none",
        "use_dictionary": False}),
        (table, {"compression": "zstd", "row_group_size": 10}), (odd, {}),
    ):  # fmt: skip
        out = io.BytesIO()
        pyarrow.parquet.write_table(one, out, **settings)
        made.append(out.getvalue())
    return made


def _table_case(kind: str) -> Callable[[Random, list[bytes], Path], None]:
    def make(rng: Random, samples: list[bytes], folder: Path) -> None:
        if kind in ("jsonl", "json") and rng.random() < 0.5:
            rows = damage.value(rng, _ROWS, rng.choice((1, 2, 9)))
            lines = [rows] if kind == "json" or not isinstance(rows, list) else rows
            content = b"\n".join(damage.as_json(rng, row) for row in lines)
        else:
            content = damage.octets(rng, rng.choice(samples))
        (folder / f"texts.{kind}").write_bytes(content)

    return make


def _read_table(_samples: Any, folder: Path) -> None:
    from abft_mlx import data
    from abft_mlx.data.queries import Queries
    from abft_mlx.recipe import DataSection

    (path,) = folder.iterdir()
    section = DataSection(source=str(path))

    def labelled() -> None:
        data.split(data.report(section).require(), section)

    calls = [lambda: [list(some) for some in Queries(str(path), section)]]
    every(*calls if path.suffix == ".txt" else [labelled, *calls])


READERS = (
    Reader("recipe", 2600, lambda _: _yaml_samples("*.yaml", "generated/*.yaml"),
           lambda rng, all_, to: yaml_case(rng, all_, to / "recipe.yaml"), _read_recipe),
    Reader("--set", 2600, _overrides, _override_case, _read_overrides),
    Reader("study file", 600, lambda _: _yaml_samples("studies/*.yaml"),
           lambda rng, all_, to: yaml_case(rng, all_, to / "study.yaml"), _read_study),
    *(Reader(kind, share, _table(kind), _table_case(kind), _read_table) for kind, share in
      (("csv", 1800), ("tsv", 500), ("jsonl", 1800), ("json", 600), ("parquet", 1600))),
    Reader("txt", 600, _table("csv"), _table_case("txt"), _read_table),
)  # fmt: skip
