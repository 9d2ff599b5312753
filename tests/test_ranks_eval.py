"""Several processes that measure together: the numbers are one process's, and none waits."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_task
from cli_support import document, invoke
from ranks_support import Job, job, model, texts

from abft_mlx import evaluation
from abft_mlx.evaluation import forward
from abft_mlx.evaluation.forward import own_rows
from abft_mlx.ranks import Ranks

__all__ = ["job", "model", "texts"]  # fixtures
PER_QUERY = ("evaluation.demonstrations=per_query", "data.holdout=protocol")
SETTINGS = (
    "prompt.demonstrations=2",
    "data.training_rows=20",
    "data.test_rows=10",
    "evaluation.queries=5",
    "evaluation.calibration_prompts=5",
    "evaluation.anchor_prompts=9",
    "evaluation.bootstrap_samples=20",
)
# One rank is killed while the other computes its part.
SLEEPER = """
import os, signal, sys
from abft_mlx.cli import app
from abft_mlx.evaluation import forward
work = forward.own_rows
def dying(*given):
    if os.environ["MLX_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*given)
forward.own_rows = dying
app(sys.argv[1:])
"""


def words(model: Path, texts: Path, *more: object) -> list[object]:
    return ["eval", "--model", model, "--data", texts, *more, *(f"--set={one}" for one in SETTINGS)]


def alike(found: Any, expected: Any, where: str = "") -> None:
    """The same document, numbers to 1e-5."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name, one in expected.items():
            alike(found[name], one, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, one in enumerate(expected):
            alike(found[place], one, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("per_query", [True, False])
def test_ranks_give_the_document_of_one_process(
    per_query: bool, model: Path, texts: Path, tmp_path: Path, checkout: Path, job: Job
) -> None:
    run = tmp_path / "run"
    sizes = ("training.updates=1", "training.prompts_per_update=4", "training.learning_rate=0.05")
    sizes += ("training.validate_every=0", *(PER_QUERY if per_query else ()))
    trained = invoke(
        "finetune", "--model", model, "--data", texts, "--output", run, "--quiet",
        "--set=training.shared_demonstrations=1", "--set=prompt.selection=random",
        "--set=objective.kind=end_to_end",
        *(f"--set={one}" for one in (*SETTINGS, *sizes)),
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    more = ("--methods", "all", "--protocol", "all") if per_query else ()
    asked = words(model, texts, "--adapter", run, *more, "--json")
    asked += [f"--set={one}" for one in (PER_QUERY if per_query else ())]
    job.start(2, checkout / "cli.py", *asked)
    expected = document(invoke(*asked))
    (status, out, err), (other, nothing, silent) = job.end(0), job.end(1)
    assert (status, other) == (0, 0), err + silent
    assert (nothing, silent) == ("", "")
    found = json.loads(out)
    alike(found, expected)
    assert expected["methods"] != expected["base"]["methods"]
    for method, one in expected["methods"].items():
        assert found["methods"][method]["right"] == one["right"]


def test_a_rank_that_dies_ends_the_others(model: Path, texts: Path, job: Job) -> None:
    job.start(2, "-c", SLEEPER, *words(model, texts, "--quiet"))
    status, out, err = job.end(0)
    assert (status, out) == (1, "")
    assert job.end(1)[0] == -signal.SIGKILL
    (line,) = [one for one in err.splitlines() if not one.startswith("[ring] ")]
    assert line.startswith("error: rank 0 of 2 lost another rank and stops (")
    assert line.endswith("nothing is lost by starting again")
    assert "--resume" not in line


def test_ranks_that_ask_otherwise_are_refused(model: Path, texts: Path, job: Job) -> None:
    start = "import os, sys; from abft_mlx.cli import app; app(sys.argv[1:] + "
    seeds = "[f'--seed={os.environ[\"MLX_RANK\"]}'])"
    job.start(2, "-c", start + seeds, *words(model, texts))
    for rank in (0, 1):
        status, _, err = job.end(rank)
        assert status == 2
        assert "rank 1 was started with another recipe, model, adapter, data or version" in err


@pytest.mark.parametrize("command", ["predict", "demo"])
def test_commands_for_one_process_say_so(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        def rank(self) -> int:
            return 1

        def size(self) -> int:
            return 2

    monkeypatch.setattr("mlx.core.distributed.init", Group)
    result = invoke(command, *(["demo"] if command == "predict" else []))
    assert result.exit_code == 2
    assert f"mlx.launch runs 2 processes and {command} is for one" in result.stderr


class Together(Ranks):
    """A rank whose exchange is with arrays that others have sent before it."""

    def __init__(self, rank: int, size: int, sent: list[mx.array]) -> None:
        super().__init__()
        self.rank, self.size, self.sent = rank, size, sent

    def sum(self, arrays: Any) -> list[mx.array]:
        (own,) = arrays
        self.sent.append(own)
        return [sum(self.sent[1:], self.sent[0])]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_shares_put_together_are_all(size: int, dtype: mx.Dtype) -> None:
    task, model = tiny_task.task(), tiny_task.model()
    model.set_dtype(dtype)
    prompts = task.test_prompts(tiny_task.recipe().evaluation)
    told: list[tuple[int, int]] = []
    sent: list[mx.array] = []
    for rank in range(size):
        joined = Together(rank, size, sent)
        found = evaluation.outputs(
            model, prompts, batch_tokens=300, ranks=joined, on_progress=lambda *o: told.append(o)
        ).hidden
    assert found.dtype == dtype
    alone = evaluation.outputs(model, prompts, batch_tokens=300).hidden
    near = 1e-5 if dtype == mx.float32 else 0.1
    np.testing.assert_allclose(
        np.array(found.astype(mx.float32)), np.array(alone.astype(mx.float32)), atol=near, rtol=near
    )
    assert told.count((len(prompts), len(prompts))) == size
    rows = [own_rows(prompts, Together(rank, size, [])) for rank in range(size)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(prompts)))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_fewer_prompts_than_ranks_are_computed_by_each() -> None:
    task, model = tiny_task.task(), tiny_task.model()
    prompts = task.test_prompts(tiny_task.recipe().evaluation)[:2]
    nobody = Together(2, 3, [])
    found = evaluation.label_probabilities(
        model, prompts, task.space, batch_tokens=512, ranks=nobody
    )
    alone = evaluation.label_probabilities(model, prompts, task.space, batch_tokens=512)
    assert not nobody.sent
    np.testing.assert_array_equal(found, alone)


def test_every_measurement_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0]
    work = forward.hidden_at_last

    def counting(tokens: mx.array, *others: Any) -> mx.array:
        passed[-1] += len(tokens)
        return work(tokens, *others)

    monkeypatch.setattr(forward, "hidden_at_last", counting)
    task, model = tiny_task.task(), tiny_task.model()
    other = tiny_task.task("data.seed=1")
    methods = "evaluation.methods=[vanilla, zero_shot, contextual, domain, batch, hidden, knn]"
    few = ("evaluation.calibration_prompts=6", "evaluation.anchor_prompts=8")
    for protocol in ("accuracy", "robustness", "bias", "unseen", "transfer"):
        changes = (methods, *few, f"evaluation.protocols=[{protocol}]")
        section = tiny_task.recipe(*changes).evaluation
        counts = []
        for ranks in (None, Together(0, 2, [])):
            passed.append(0)
            if ranks is not None:
                monkeypatch.setattr(ranks, "sum", list)
            evaluation.measure(model, task, section, others=(other,), ranks=ranks)
            counts.append(passed[-1])
        assert 0 < counts[1] < 0.6 * counts[0], protocol
