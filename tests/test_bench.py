"""The bench: its counts against counts by hand, its contenders against each other."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from cli_support import document, invoke

from abft_mlx import attention
from abft_mlx.bench import contenders, measure, sizes, torch_way
from abft_mlx.errors import UsageError
from abft_mlx.objective import abft_terms

TINY = sizes.parse("2x64x96:4x40k3")


def test_sizes_are_read_and_written_alike() -> None:
    assert sizes.parse(str(sizes.REFERENCE)) == sizes.REFERENCE
    assert str(TINY) == "2x64x96:4x40k3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12x768", "is not like 12x768x32000:8x160k4"),
        ("2x65x96:4x40k3", "multiple of 64"),
        ("0x64x96:4x40k3", "at least 1"),
        ("2x64x96:4x8k3", "four tokens for each text"),
    ],
)
def test_a_wrong_size_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        sizes.parse(text)
    assert text in str(raised.value)


def test_a_steps_operations_are_those_of_its_layers() -> None:
    """Of two layers: the forward pass of one and the keys and queries of the second, and back."""
    size = sizes.parse("2x256x96:4x40k3")
    tokens, width = size.prompts * size.tokens, size.width
    whole = 2 * tokens * (4 * width**2 + 3 * width * size.mlp_width)
    keys = 2 * tokens * 2 * width**2
    least = 2 * (whole + keys)
    assert least * 0.9 < sizes.step_flops(size) < least * 1.35
    larger = sizes.parse("2x256x96:8x40k3")
    assert sizes.step_flops(larger) == pytest.approx(2 * sizes.step_flops(size), rel=0.01)


def test_prompts_share_what_they_say() -> None:
    made = sizes.random_prompts(TINY, together=2)
    heads = [one.token_ids[: one.label_positions[-1] + 1] for one in made]
    assert heads[0] == heads[1] != heads[2] == heads[3]
    assert {len(one.token_ids) for one in made} == {TINY.tokens}
    assert all(one.gold in one.demonstration_labels for one in made)


def test_the_papers_way_has_our_loss() -> None:
    """Same weights, same prompts, no filter: eager PyTorch's loss is ours."""
    torch = tiny_models.torch()
    model = sizes.random_model(TINY, mx.float32)
    arrays = contenders.batch_of(TINY).arrays()
    rows = attention.capture(model, arrays["tokens"], arrays["last"])
    ours = abft_terms(
        rows,
        arrays["label_positions"],
        arrays["demonstration_labels"],
        arrays["gold"],
        arrays["last"],
        punish_weight=sizes.PUNISH,
        reward_weight=sizes.REWARD,
        use_filter=False,
    ).loss.item()
    reference = torch_way.reference(TINY, mx.float32)
    theirs = 0.0
    with torch.no_grad():
        for prompt in sizes.random_prompts(TINY):
            output = reference(
                input_ids=torch.tensor([prompt.token_ids]), output_attentions=True, use_cache=False
            )
            one = torch_way.equation_1(output.attentions, prompt, use_filter=False)
            theirs += float(one)
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_mlx_lms_step_learns_the_label() -> None:
    update = contenders.CONTENDERS["mlx-lm-qk"](TINY, mx.float32)
    losses = [update() for _ in range(30)]
    assert losses[-1] < losses[0]


def test_every_contender_makes_updates_and_is_measured() -> None:
    tiny_models.torch()
    names = measure.names_without([])
    rows = measure.compare(TINY, names, repeats=1, memory=False)
    assert [one.name for one in rows] == [*names, "limit"]
    assert all(one.seconds > 0 and one.examples_per_second > 0 for one in rows)
    assert rows[-1].flops == sizes.step_flops(TINY)
    content = measure.document({TINY: rows}, "float32")
    assert content["limit"]["flops_per_second"] > 0
    assert content["sizes"][0]["rows"][0]["name"] == "ours-exact"
    json.dumps(content, allow_nan=False)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    left_out = [one for one in contenders.CONTENDERS if one not in ("ours-exact", "forward")]
    without = [word for one in left_out for word in ("--without", one)]
    chosen = ["--size", TINY, "--repeats", 1, "--output", file, *without]
    result = invoke("bench", *chosen, "--json")
    assert result.exit_code == 0, result.stderr
    content = document(result)
    assert content == json.loads(file.read_text())
    rows = {one["name"]: one for one in content["sizes"][0]["rows"]}
    assert list(rows) == ["ours-exact", "forward", "limit"]
    assert rows["ours-exact"]["peak_memory_bytes"] > sizes.weight_bytes(TINY, mx.float32)
    assert np.isfinite([one["seconds"] for one in rows.values()]).all()
    shown = invoke("bench", *chosen, "--overwrite")
    assert "of exact" in shown.stdout
    assert "1.00x" in shown.stdout


def test_an_unknown_contender_is_one_line() -> None:
    result = invoke("bench", "--without", "nosuch")
    assert result.exit_code == 2
    assert "nosuch" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "none" / "bench.json"):
        result = invoke("bench", "--size", TINY, "--output", output)
        assert result.exit_code == 2
        assert str(output.parent) in result.stderr
        assert "warming up" not in result.stdout
    held = tmp_path / "held.json"
    held.write_text("precious", encoding="utf-8")
    result = invoke("bench", "--size", TINY, "--output", held)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert held.read_text(encoding="utf-8") == "precious"
