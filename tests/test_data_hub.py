"""Data sets of the hub, against a server on this machine, then from the cache without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from abft_mlx.data import hub, rows
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection

CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train-*
  - split: test
    path: small/test-*
- config_name: large
  data_files: large/*.jsonl
---
# words
"""


def jsonl(*pairs: tuple[str, object]) -> bytes:
    return "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in pairs).encode()


def parquet(pairs: list[tuple[str, int]], names: list[str]) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="pyarrow (extra data) writes the Parquet file")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra data) writes it")
    features = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"dtype": "string"}}
    table = pa.table({"text": [t for t, _ in pairs], "label": [x for _, x in pairs]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def repositories() -> dict[tuple[str, str], dict[str, bytes]]:
    """(name, revision) -> files."""
    return {
        ("made/carded", "main"): {
            "README.md": CARD.encode(),
            "small/train-00000-of-00002.jsonl": jsonl(("one", 0), ("two", 1)),
            "small/train-00001-of-00002.jsonl": jsonl(("three", 0), ("", 1)),
            "small/test-00000-of-00001.jsonl": jsonl(("four", 1)),
            "large/all.jsonl": jsonl(("five", 0), ("six", 1)),
        },
        ("made/plain", "main"): {
            "train.csv": b"text,label\na,x\nb,y\n",
            "dev.csv": b"text,label\nc,x\n",
        },
        ("made/script", "main"): {"script.py": b"print('never run')"},
        ("made/script", hub.CONVERTED): {
            "default/train/0000.parquet": parquet([("p", 1), ("q", 0)], ["low", "high"])
        },
    }


@pytest.fixture(scope="module")
def endpoint() -> Iterator[LoopbackHub]:
    with LoopbackHub().serving() as server:
        for (name, revision), files in repositories().items():
            server.add(name, files, repo_type="dataset", ref=revision)
        yield server


PROGRAM = """
import json, sys
from abft_mlx.data import load
from abft_mlx.errors import AbftError
from abft_mlx.recipe import DataSection
for values in json.load(sys.stdin):
    try:
        texts = load(DataSection(**values))
        print(json.dumps({
            "source": texts.source, "texts": texts.texts, "labels": texts.labels,
            "names": texts.names,
        }))
    except AbftError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


def reports(
    hub: LoopbackHub, cache: Path, *sections: dict[str, object], offline: bool = False
) -> list[dict[str, object]]:
    """Read data sets in a fresh process: the hub's library looks at its endpoint on import."""
    environment = {**os.environ, **hub.environment(cache)}
    if offline:
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        input=json.dumps(sections),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_read_from_the_hub_then_from_the_cache(endpoint: LoopbackHub, tmp_path: Path) -> None:
    sections: list[dict[str, object]] = [
        {"source": "made/carded", "config": "small"},
        {"source": "made/carded", "config": "small", "split": "test+train", "empty_texts": "keep"},
        {"source": "made/carded", "config": "large"},
        {"source": "made/carded"},
        {"source": "made/carded", "config": "tiny"},
        {"source": "made/carded", "config": "small", "split": "dev"},
        {"source": "made/plain"},
        {"source": "made/plain", "split": "train+validation"},
        {"source": "made/script"},
        {"source": "made/script", "labels": ["no", "yes"]},
    ]
    first = reports(
        endpoint,
        tmp_path,
        *sections,
        {"source": "made/none"},
        {"source": "made/plain", "revision": "old"},
    )
    again = reports(endpoint, tmp_path, *sections, offline=True)
    assert again == first[: len(sections)]
    empty, joined, large, unset, unknown, split, plain, both, script, named = again
    assert empty["error"] == (
        "DataError: made/carded small train: train-00001-of-00002.jsonl row 2: the text is empty; "
        "fix or remove the row, or set data.empty_texts: drop"
    )
    assert joined["texts"] == ["four", "one", "two", "three", ""]
    assert large["texts"] == ["five", "six"]
    assert "must be one of large, small; none is set" in str(unset["error"])
    assert "must be one of large, small; 'tiny' is none of them" in str(unknown["error"])
    assert "no files for split 'dev'; splits are train, test" in str(split["error"])
    assert (plain["texts"], plain["names"]) == (["a", "b"], ["x", "y"])
    assert both["texts"] == ["a", "b", "c"]
    assert (script["names"], script["labels"]) == (["low", "high"], [1, 0])
    assert named["names"] == ["no", "yes"]
    assert "DataError: 'made/none' is no file here and no data set of the hub" in str(first[-2])
    assert "DataError: made/plain has no revision 'old'" in str(first[-1])
    (missing,) = reports(endpoint, tmp_path / "other", {"source": "made/plain"}, offline=True)
    assert "RunError: made/plain train is not in the local cache" in str(missing["error"])


def test_half_a_cache_is_refused(endpoint: LoopbackHub, tmp_path: Path) -> None:
    section: dict[str, object] = {"source": "made/carded", "config": "small", "empty_texts": "keep"}
    reports(endpoint, tmp_path, section)
    (shard,) = tmp_path.rglob("train-00001-of-00002.jsonl")
    shard.unlink()
    (told,) = reports(endpoint, tmp_path, section, offline=True)
    assert "RunError: made/carded: 1 of 2 files of a split are in the local cache" in str(told)


def test_guessing_files_without_a_card() -> None:
    def guess(files: list[str], **values: object) -> list[str]:
        section = DataSection.model_validate({"source": "a/b", **values})
        return hub._of_split(section, files, [])

    assert guess(["all.jsonl"]) == ["all.jsonl"]
    assert guess(["data/train.jsonl", "data/test.jsonl"], split="test") == ["data/test.jsonl"]
    assert guess(["x/train/0.jsonl", "y/train/0.jsonl"], config="y") == ["y/train/0.jsonl"]
    assert guess(["train.csv", "train.jsonl"]) == ["train.jsonl"]
    assert guess(["constrained.csv", "train.csv"]) == ["train.csv"]
    with pytest.raises(DataError, match="must be one of x, y; none is set"):
        guess(["x/train.csv", "y/train.csv"])
    with pytest.raises(DataError, match="no files for split 'test'"):
        guess(["train.csv"], split="test")
    assert guess(["notes.md"]) == []


@pytest.mark.parametrize("name", ["rotten_tomatoes", "trec"])
def test_staicc_order_of_the_source_order_is_the_golden_table(name: str, shared: Path) -> None:
    table = rows.read(shared / "data" / f"{name}.jsonl", "text", "label")
    order = hub.staicc_order([rows.Row("", "", i) for i in range(len(table.rows))])
    source = [None] * len(order)
    for golden, place in zip(table.rows, order, strict=True):
        source[place.label] = golden
    if name == "rotten_tomatoes":
        assert [row.label for row in source] == [1] * 4265 + [0] * 4265
    long = rows.Row("", "x" * 1025, 0)
    assert hub.staicc_order([long, *source]) == table.rows
