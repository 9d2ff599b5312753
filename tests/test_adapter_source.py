"""Where an adapter is: what is asked of the hub, and every answer word for word, without a hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from abft_mlx import adapters, hub
from abft_mlx.errors import AdapterError, RunError

FILES = ("adapters.safetensors", "adapter_model.safetensors", "adapter_config.json",
         "lora.safetensors", "head_weights.safetensors",
         "recipe.yaml", "run.json", "demonstrations.jsonl")  # fmt: skip


class Hub:
    """Stands in for the hub: remembers what was asked, answers with a folder or an error."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[str, tuple[str, ...], str | None]] = []

    def snapshot(self, name: str, patterns: Sequence[str], *, revision: str | None = None) -> Path:
        self.asked.append((name, tuple(patterns), revision))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def answering(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> Hub:
    found = Hub(answer)
    monkeypatch.setattr(hub, "snapshot", found.snapshot)
    return found


def answered(kind: type[errors.HfHubHTTPError]) -> Exception:
    """What the hub's library raises; how it is made differs from version to version."""
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    return error


@pytest.mark.parametrize(
    ("name", "revision"), [("owner/mails", None), ("owner/mails@v1", "v1")], ids=str
)
def test_what_is_asked_of_the_hub(
    name: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").touch()
    asked = answering(monkeypatch, tmp_path).asked
    found = adapters.find(name)
    assert asked == [("owner/mails", FILES, revision)]
    assert (found, str(found)) == (adapters.Source(name, tmp_path), name)
    assert adapters.local_folder(name) == tmp_path
    assert adapters.find(found) is found
    assert len(asked) == 2


def test_folders_win_and_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, tmp_path).asked
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "owner" / "mails"
    run.mkdir(parents=True)
    for name, folder in (
        ("owner/mails", Path("owner/mails")),
        ("~/owner/mails", run),
        (run, run),
    ):
        assert adapters.find(name) == adapters.Source(str(name), folder)
    assert not asked


NOWHERE = (
    "adapter {name!r}: no such folder; give a run folder, or a hub id like owner/name or "
    "owner/name@revision"
)


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("nowhere", None, NOWHERE),
        ("a/b/c", None, NOWHERE),
        ("~/a.csv", None, "adapter {name} is a file; give the folder that it is in"),
        (
            "owner/mails",
            "nothing",
            "adapter {name}: the repository holds no adapter (no adapter_config.json)",
        ),
        (
            "owner/mails",
            "empty",
            "adapter {name}: the repository holds no adapter (no adapter_config.json)",
        ),
        (
            "owner/mails",
            answered(errors.RepositoryNotFoundError),
            "adapter {name!r} is neither a folder here nor a repository of the hub that you may "
            "read; check the spelling, or run hf auth login if it is private",
        ),
        (
            "owner/mails@v7",
            answered(errors.RevisionNotFoundError),
            "adapter owner/mails has no revision 'v7'; leave it out for the newest",
        ),
    ],
)
def test_what_is_no_adapter(
    name: str, answer: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty").mkdir()
    answering(monkeypatch, answer if isinstance(answer, Exception) else tmp_path / str(answer))
    with pytest.raises(AdapterError) as caught:
        adapters.find(name)
    assert str(caught.value) == message.format(name=name)


def test_a_hub_that_cannot_be_reached_may_be_later(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, errors.LocalEntryNotFoundError("no network"))
    with pytest.raises(RunError) as caught:
        adapters.find("owner/mails@v1")
    assert not isinstance(caught.value, AdapterError)
    assert str(caught.value) == (
        "adapter owner/mails at revision 'v1' is not in the local cache and the hub cannot be "
        "reached; go online once to fetch it, or give a run folder"
    )
