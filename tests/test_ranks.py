"""Several processes that train together: the adapter is one process's, and none waits for ever."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from cli_support import invoke
from ranks_support import PATIENCE_SECONDS, Job, job, model, texts

from abft_mlx import ranks
from abft_mlx.errors import UsageError
from abft_mlx.trainer import checkpoint

__all__ = ["job", "model", "texts"]  # fixtures
SETTINGS = (
    "prompt.demonstrations=3",
    "prompt.selection=random",
    "objective.kind=abft",
    "training.examples=24",
    "training.updates=4",
    "training.learning_rate=0.001",
    "data.test_rows=4",
)
ALIKE = ("step", "seen_examples", "tokens", "B", "induction_heads", "validation_accuracy")
NEARLY = ("loss", "punish", "reward", "A")

WORKER = """
import sys, time
import mlx.core as mx
from abft_mlx import ranks
from abft_mlx.errors import UsageError
ours = ranks.join()
n = ours.rank
large, small, scalar = ours.sum(
    [mx.arange(6.0).reshape(2, 3) * (n + 1), mx.full((2,), n, dtype=mx.bfloat16), mx.array(2.0**n)]
)
assert large.tolist() == [[0, 6, 12], [18, 24, 30]], large
assert small.dtype == mx.bfloat16 and small.tolist() == [3, 3], small
assert scalar.item() == 7 and scalar.shape == (), scalar
assert ours.count(n + 1) == 6
ours.agree("the same", "recipe")
try:
    ours.agree(f"from {n == 2}", "recipe")
except UsageError as error:
    assert "rank 2 was started with another recipe than rank 0" in str(error)
else:
    raise AssertionError("nobody saw the difference")
print("ready", flush=True)
if n == 1:
    time.sleep(600)
ours.wait()
"""


def finetune(model: Path, texts: Path, folder: Path, settings: Sequence[str]) -> list[object]:
    words: list[object] = ["finetune", "--model", model, "--data", texts, "--output", folder]
    return [*words, *(f"--set={one}" for one in [*SETTINGS, *settings])]


def lines(folder: Path) -> list[dict]:
    return [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (
            2,
            [
                "training.prompts_per_update=11",
                "data.validation_rows=5",
                "training.validate_every=2",
                "training.keep_best=false",
                "adapter.layers=[1]",
            ],
        ),
        pytest.param(
            4,
            ["training.shared_demonstrations=2", "training.prompts_per_update=12"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_give_the_adapter_of_one_process(
    size: int,
    settings: list[str],
    model: Path,
    texts: Path,
    tmp_path: Path,
    checkout: Path,
    job: Job,
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    job.start(size, checkout / "cli.py", *finetune(model, texts, together, settings), "--json")
    result = invoke(*finetune(model, texts, alone, settings))
    assert result.exit_code == 0, result.stderr
    ended = [job.end(rank) for rank in range(size)]
    assert [status for status, _, _ in ended] == [0] * size, ended
    assert json.loads(ended[0][1])["updates"] == 4
    assert [out for _, out, _ in ended[1:]] == [""] * (size - 1)
    assert [err for _, _, err in ended[1:]] == [""] * (size - 1)

    expected, found = (mx.load(str(one / "adapters.safetensors")) for one in (alone, together))
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(one), atol=1e-5, err_msg=name)
    ours, theirs = lines(together), lines(alone)
    assert len(ours) == len(theirs) == 4
    for here, there in zip(ours, theirs, strict=True):
        assert [here.get(name) for name in ALIKE] == [there.get(name) for name in ALIKE]
        for name in NEARLY:
            assert here[name] == pytest.approx(there[name], rel=1e-5, abs=1e-7), name
    assert len({one["induction_heads"] for one in ours}) > 1
    assert len({one["A"] for one in ours}) > 1
    assert all(0 < one.get("validation_accuracy", 0.5) < 1 for one in ours)
    totals = json.loads((together / "run.json").read_text())["totals"]
    assert totals["processes"] == size
    assert "processes" not in json.loads((alone / "run.json").read_text())["totals"]


def begin(model: Path, texts: Path, folder: Path, checkout: Path, job: Job) -> None:
    """Start two ranks of a run without end, and wait for its first update."""
    settings = ["training.updates=1000000", "training.prompts_per_update=4"]
    job.start(2, checkout / "cli.py", *finetune(model, texts, folder, settings), "--quiet")
    until = time.monotonic() + PATIENCE_SECONDS
    while not (folder / "metrics.jsonl").exists():
        assert job.processes[0].poll() is None, job.end(0)
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_killed_rank_ends_the_others(
    model: Path, texts: Path, tmp_path: Path, checkout: Path, job: Job
) -> None:
    folder = tmp_path / "run"
    begin(model, texts, folder, checkout, job)
    job.processes[1].send_signal(signal.SIGKILL)
    status, _, err = job.end(0)
    assert status == 1
    (line,) = [one for one in err.splitlines() if not one.startswith("[ring] ")]
    assert line.startswith("error: rank 0 of 2 lost another rank and stops (")
    assert not json.loads((folder / "run.json").read_text())["finished"]


def test_a_rank_that_is_asked_to_end_ends_all_after_the_same_update(
    model: Path, texts: Path, tmp_path: Path, checkout: Path, job: Job
) -> None:
    folder = tmp_path / "run"
    begin(model, texts, folder, checkout, job)
    job.processes[1].send_signal(signal.SIGTERM)
    for rank in (0, 1):
        status, _, err = job.end(rank)
        assert status == 143, err
        assert err.endswith("error: terminated\n")
    held = checkpoint.load(folder / "checkpoint").facts["progress"]["updates"]
    assert held == (folder / "metrics.jsonl").read_bytes().count(b"\n") > 0


def test_sums_agreement_and_a_rank_that_never_comes(job: Job) -> None:
    # One is asleep: the others' MLX would wait for it for ever.
    job.start(3, "-c", WORKER, ABFT_MLX_RANK_TIMEOUT="5")
    waited = []
    for rank in (0, 2):
        status, out, err = job.end(rank)
        assert (status, out) == (1, "ready\n"), err
        assert f"error: rank {rank} of 3 " in err
        waited.append(f"rank {rank} of 3 has waited 5 s for another rank" in err)
    # Whichever gives up first takes its connections along, and the other may see only that.
    assert any(waited)


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan", "inf"])
def test_a_wrong_timeout_is_refused(seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.TIMEOUT_VARIABLE, seconds)
    with pytest.raises(UsageError, match=f"ABFT_MLX_RANK_TIMEOUT={seconds}: must be a number"):
        ranks.join()


def test_more_ranks_than_groups_are_refused(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Group:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 3

    monkeypatch.setattr("mlx.core.distributed.init", Group)
    settings = ["training.shared_demonstrations=2", "training.prompts_per_update=4"]
    result = invoke(*finetune(model, texts, tmp_path / "run", settings))
    assert result.exit_code == 2
    assert "prompts_per_update 4: 2 groups of prompts cannot be shared by 3" in result.stderr
    assert not (tmp_path / "run").exists()
