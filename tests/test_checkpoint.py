"""Checkpoints as sets: whole at every moment, damage seen, the one before taken, metrics exact."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_trainer import StopHereError, make_recipe, make_trainer, same, trained

from abft_mlx import files
from abft_mlx.errors import OutputError, RunError
from abft_mlx.trainer import RunFolder, checkpoint, generations


def fill(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "one").write_text(text)
        (folder / "two").write_text(text * 1000)

    return write


def held(folder: Path) -> str | None:
    """What the newest whole one says."""
    chosen, _ = generations.newest(folder)
    return None if chosen is None else (chosen / "one").read_text()


class KilledError(BaseException):
    """Stands for SIGKILL: nothing that changes the disk runs after it."""


class Killed:
    """Ends at the n-th operation on the disk, before it or, of a removal, in the middle."""

    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        self.dead = False
        for owner, name in (
            (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (files, "sync"),
            (files, "sync_folder"), (shutil, "rmtree"), (Path, "unlink"),
        ):  # fmt: skip
            patch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            if self.dead:
                raise KilledError
            self.left -= 1
            if self.left < 0:
                self.dead = True
                if name == "rmtree" and given[0].is_dir():
                    for one in list(given[0].iterdir())[:1]:
                        one.write_text("")
                raise KilledError
            return real(*given, **options)

        return call


@pytest.mark.parametrize("again", [False, True])
def test_a_set_is_whole_whenever_the_process_ends(tmp_path: Path, again: bool) -> None:
    """Killed at every operation of a write, of a first one and of a third, then settled."""
    after, ended = 0, False
    while not ended:
        folder = tmp_path / str(after) / "set"
        folder.parent.mkdir()
        for text in ("a", "b") if again else ():
            generations.replace(folder, fill(text))
        with pytest.MonkeyPatch.context() as patch:
            Killed(patch, after)
            try:
                generations.replace(folder, fill("c"))
                ended = True
            except KilledError:
                pass
        found = held(folder)
        assert found in (("b", "c") if again else (None, "c")), after
        every = [one for one in generations.names(folder) if one.is_dir()]
        assert sum(generations.damage(one) is None for one in every) >= 2 * again, after
        chosen, wrong = generations.newest(folder)
        assert not wrong
        if chosen is not None:
            generations.settle(folder, chosen)
        generations.replace(folder, fill("d"))
        assert held(folder) == "d"
        shutil.rmtree(folder)
        # What lay there is still to be had: two generations, not one.
        assert held(folder) == found
        after += 1
    assert found == "c"
    assert after > 8


def test_settling_can_be_killed_too(tmp_path: Path) -> None:
    for state in ("new", "damaged"):
        after, ended = 0, False
        while not ended:
            folder = tmp_path / f"{state}{after}" / "set"
            folder.parent.mkdir()
            for text in ("a", "b"):
                generations.replace(folder, fill(text))
            if state == "new":
                shutil.copytree(folder, folder.with_name("set.new"))
                wanted = "b"
            else:
                (folder / "two").write_text("")
                wanted = "a"
            with pytest.MonkeyPatch.context() as patch:
                Killed(patch, after)
                try:
                    chosen, _ = generations.newest(folder)
                    assert chosen is not None
                    generations.settle(folder, chosen)
                    ended = True
                except KilledError:
                    pass
            assert held(folder) == wanted, (state, after)
            after += 1
        assert after > 2
        assert not folder.with_name("set.new").exists()


def test_the_manifest_holds_what_sha256sum_says(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    generations.replace(folder, fill("x"))
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {"one", "two"}
    for name, known in listed.items():
        content = (folder / name).read_bytes()
        assert known == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def no_manifest(path: Path) -> None:
    path.with_name("manifest.json").unlink()


def bad_manifest(path: Path) -> None:
    path.with_name("manifest.json").write_text("[]")


def newer_manifest(path: Path) -> None:
    path.with_name("manifest.json").write_text('{"schema": 2, "files": {}}')


DAMAGES = [
    (torn, "damaged (state.safetensors is not what manifest.json says)"),
    (flipped, "damaged (state.safetensors is not what manifest.json says)"),
    (Path.unlink, "damaged (state.safetensors: No such file or directory)"),
    (no_manifest, "half-written (no manifest.json)"),
    (bad_manifest, "manifest.json cannot be read"),
    (newer_manifest, "manifest.json has schema 2, this version reads 1"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    whole = make_trainer(make_recipe(), fingerprint="a")
    whole.run()
    folder = RunFolder(tmp_path / "run")
    folder.create()
    make_trainer(make_recipe("training.updates=5"), folder, fingerprint="a").run()
    damage(folder.checkpoint_path / checkpoint.FILE_NAME)
    notices: list[str] = []
    resumed = make_trainer(make_recipe(), folder, fingerprint="a", on_notice=notices.append)
    resumed.run(resume=True)
    assert notices == [
        f"{folder.checkpoint_path}: {said}; going on from the one before, after update 4"
    ]
    assert same(trained(resumed.model), trained(whole.model))
    assert [one["step"] for one in folder.metrics()] == [1, 2, 3, 4, 5, 6]
    damage(folder.checkpoint_path / checkpoint.FILE_NAME)
    with pytest.warns(RuntimeWarning, match="from the one before, after update 4"):
        make_trainer(make_recipe(), folder, fingerprint="a").run(resume=True)


def test_where_no_checkpoint_is_whole_one_line_says_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    make_trainer(make_recipe(), folder, fingerprint="a").run()
    before = folder.path / "checkpoint.before"
    for one in (folder.checkpoint_path, before):
        torn(one / checkpoint.FILE_NAME)
    kept = folder.metrics_path.read_bytes()
    with pytest.raises(OutputError, match="no checkpoint can be used: ") as caught:
        make_trainer(make_recipe(), folder, fingerprint="a").run(resume=True)
    assert f"{folder.checkpoint_path}: damaged" in str(caught.value)
    assert f"{before}: damaged" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert folder.metrics_path.read_bytes() == kept


def interrupted(folder: RunFolder, step: int) -> None:
    def stop(update: Any) -> None:
        if update.step == step:
            raise StopHereError

    folder.create()
    with pytest.raises(StopHereError):
        make_trainer(make_recipe(), folder, fingerprint="a", on_update=stop).run()


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "seen_ex', b"\xff\xfe", b'{"step": 9}\n'])
def test_metrics_have_each_line_once_whatever_the_end_was(tmp_path: Path, tail: bytes) -> None:
    folder = RunFolder(tmp_path / "run")
    interrupted(folder, 3)
    first = folder.metrics_path.read_bytes().split(b"\n")
    with folder.metrics_path.open("ab") as lines:
        lines.write(tail)
    make_trainer(make_recipe(), folder, fingerprint="a").run(resume=True)
    assert [one["step"] for one in folder.metrics()] == [1, 2, 3, 4, 5, 6]
    # The lines that stay are the same bytes, seconds and all.
    assert folder.metrics_path.read_bytes().split(b"\n")[:2] == first[:2]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["1"], "line 2 is not that of update 2"),
        (["2", "1"], "line 1 is not that of update 1"),
        (["1", "1"], "line 2 is not that of update 2"),
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


def test_metrics_that_are_gone_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    interrupted(folder, 3)
    folder.metrics_path.unlink()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot be read"):
        make_trainer(make_recipe(), folder, fingerprint="a").run(resume=True)


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


def test_a_disk_that_is_full_leaves_the_last_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    make_trainer(make_recipe(), folder, fingerprint="a").run()
    kept = sorted(p for p in folder.path.rglob("*"))

    def full(*given: object, **options: object) -> None:
        del given, options
        raise RuntimeError("[write] Unable to write 9 bytes to file.")

    monkeypatch.setattr("mlx.core.save_safetensors", full)
    trainer = make_trainer(make_recipe("training.updates=8"), folder, fingerprint="a")
    with pytest.raises(RunError, match="MB are free: free some space"):
        trainer.run(resume=True)
    assert sorted(p for p in folder.path.rglob("*")) == kept
    monkeypatch.undo()
    assert checkpoint.load(folder.checkpoint_path)[0].facts["progress"]["updates"] == 6
