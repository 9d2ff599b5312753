"""The bench: its contenders against each other, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from cli_support import document, invoke

from abft_mlx import bench
from abft_mlx.errors import UsageError

TINY = bench.parse("2x64x96:4x40k3")


def test_sizes_are_read_and_written_alike() -> None:
    assert bench.parse(str(bench.REFERENCE)) == bench.REFERENCE
    for text in ("12x768", "2x65x96:4x40k3", "0x64x96:4x40k3", "2x64x96:4x8k3"):
        with pytest.raises(UsageError, match=text):
            bench.parse(text)


def test_prompts_share_what_they_say() -> None:
    prompts = bench.random_prompts(TINY, together=2)
    heads = [prompt.token_ids[: prompt.label_positions[-1] + 1] for prompt in prompts]
    assert heads[0] == heads[1] != heads[2] == heads[3]
    assert {len(prompt.token_ids) for prompt in prompts} == {TINY.tokens}
    assert all(prompt.gold in prompt.demonstration_labels for prompt in prompts)


def test_every_contender_makes_updates_and_is_measured() -> None:
    rows = bench.compare(TINY, repeats=1)
    assert [row.name for row in rows] == list(bench.CONTENDERS)
    assert all(row.seconds > 0 and row.peak_memory_bytes > 4 * 2 * 96 * 64 for row in rows)
    content = bench.document({TINY: rows}, "float32")
    assert content["sizes"][0]["rows"][0]["name"] == "ours-exact"
    update = bench.CONTENDERS["mlx-lm-default"](TINY, mx.float32)
    losses = [update() for _ in range(30)]
    assert losses[-1] < losses[0]


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    chosen = ["--size", TINY, "--repeats", 1, "--output", file]
    result = invoke("bench", *chosen, "--json")
    assert result.exit_code == 0, result.stderr
    content = document(result)
    assert content == json.loads(file.read_text())
    rows = {row["name"]: row for row in content["sizes"][0]["rows"]}
    assert list(rows) == ["ours-exact", "ours-shared", "mlx-lm-default"]
    assert rows["ours-exact"]["peak_memory_bytes"] > 4 * 2 * 96 * 64
    refused = invoke("bench", *chosen)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    shown = invoke("bench", *chosen, "--overwrite")
    assert "of exact" in shown.stdout
    assert "1.00x" in shown.stdout


def test_wrong_usage_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "none" / "bench.json"
    for options in (("--size", "big"), ("--size", TINY, "--output", output)):
        result = invoke("bench", *options)
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert "warming up" not in result.stdout
