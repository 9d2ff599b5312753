"""Checkpoints: whole at every moment, damage is refused, metrics are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from test_trainer import StopHereError, make_recipe, make_trainer, metrics

from abft_mlx.errors import OutputError
from abft_mlx.events import OnUpdate
from abft_mlx.trainer import RunFolder, checkpoint


class KilledError(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("cut", [0, -1])
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(tmp_path: Path, cut: int) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    make_trainer(make_recipe(), folder, fingerprint="a").run()
    state = folder.checkpoint_path / checkpoint.FILE_NAME
    state.write_bytes(state.read_bytes()[:cut])
    kept = folder.metrics_path.read_bytes()
    with pytest.raises(OutputError, match="not a readable checkpoint") as caught:
        make_trainer(make_recipe(), folder, fingerprint="a").run(resume=True)
    assert "\n" not in str(caught.value)
    assert folder.metrics_path.read_bytes() == kept


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends while one is written leaves the one before."""

    def killed(*_: Path) -> None:
        raise KilledError

    folder = tmp_path / "checkpoint"
    first = checkpoint.Checkpoint({"a": mx.zeros(3)}, {}, facts={"n": 1})
    checkpoint.save(folder, first)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KilledError):
        checkpoint.save(folder, checkpoint.Checkpoint({"a": mx.ones(3)}, {}, facts={"n": 2}))
    monkeypatch.undo()
    assert checkpoint.load(folder).facts == {"n": 1}
    assert checkpoint.load(folder).trainable["a"].tolist() == [0, 0, 0]


def interrupted(folder: RunFolder, step: int) -> None:
    def stop(update: Any) -> None:
        if update.step == step:
            raise StopHereError

    folder.create()
    with pytest.raises(StopHereError):
        make_trainer(make_recipe(), folder, fingerprint="a", events=OnUpdate(stop)).run()


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "seen_ex', b'{"step": 9}\n'])
def test_metrics_have_each_line_once_whatever_the_end_was(tmp_path: Path, tail: bytes) -> None:
    folder = RunFolder(tmp_path / "run")
    interrupted(folder, 3)
    first = folder.metrics_path.read_bytes().split(b"\n")
    with folder.metrics_path.open("ab") as lines:
        lines.write(tail)
    make_trainer(make_recipe(), folder, fingerprint="a").run(resume=True)
    assert [one["step"] for one in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    # The lines that stay are the same bytes, seconds and all.
    assert folder.metrics_path.read_bytes().split(b"\n")[:2] == first[:2]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["1"], "line 2 is not that of update 2"),
        (["2", "1"], "line 1 is not that of update 1"),
        (["1", "null"], "line 2 is not that of update 2"),
    ],
)
def test_missing_metrics_are_refused_and_nothing_changes(
    tmp_path: Path, lines: list[str], said: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    interrupted(folder, 3)
    text = "".join(f'{{"step": {one}}}\n' for one in lines)
    folder.metrics_path.write_text(text)
    with pytest.raises(OutputError, match=said):
        make_trainer(make_recipe(), folder, fingerprint="a").run(resume=True)
    assert folder.metrics_path.read_text() == text


def test_a_resumed_run_cuts_updates_as_it_did_whatever_memory_is_left(tmp_path: Path) -> None:
    """The last bits depend on it."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    trainer = make_trainer(make_recipe(), folder, fingerprint="a")
    trainer.backoff.rows = 2
    trainer.run()
    resumed = make_trainer(make_recipe(), folder, fingerprint="a")
    assert resumed.rows == 8
    resumed.run(resume=True)
    assert resumed.rows == 2


def test_a_refusal_names_what_differs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    then = {"training.seed": 1, "adapter.layers": None, "the version of mlx": "0.1", "same": [1]}
    make_trainer(make_recipe(), folder, fingerprint="a", made_with=then).run()
    now = {"training.seed": 2, "adapter.layers": (0, 1), "the version of mlx": "0.2", "same": (1,)}
    with pytest.raises(OutputError) as caught:
        make_trainer(make_recipe(), folder, fingerprint="b", made_with=now).run(resume=True)
    assert (
        "(training.seed was 1 and is 2, adapter.layers was null and is [0, 1], "
        'the version of mlx was "0.1" and is "0.2");'
    ) in str(caught.value)
    assert checkpoint.difference({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, {}).endswith(
        "and 2 more"
    )
    assert len(checkpoint.difference({"a": "x" * 999}, {})) < 100
