"""Downloads from a hub on this machine: who is told of their bytes, and who draws nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import invoke, write_model, write_texts
from huggingface_hub import constants, utils
from loopback_hub import OWNER, LoopbackHub

from abft_mlx import hub

BASE, DATA = "made/base", "made/mails"
LARGE = b"text,label\n" + b"a film,ham\n" * 200_000

# The hub's client uploads large files by a way of its HTTP library that is going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("server"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """Bars as at the start of a program; transformers switches them off for the whole process."""
    before = utils.are_progress_bars_disabled()
    utils.enable_progress_bars()
    yield
    if before:
        utils.disable_progress_bars()


@pytest.fixture
def server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub().serving() as found:
        found.enter(monkeypatch, tmp_path / "home", OWNER)
        found.add(BASE, model)
        found.add(DATA, {"data.csv": LARGE, "README.md": b"none"}, repo_type="dataset")
        yield found


def test_a_watcher_hears_of_every_byte_and_no_bar_is_drawn(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, int, int]] = []
    with hub.watched(lambda *one: told.append(one)):
        folder = hub.snapshot(BASE, ["*.json", "*.safetensors"])
    assert capsys.readouterr() == ("", "")
    names = [one.name for one in folder.iterdir()]
    size = sum((model / name).stat().st_size for name in names)
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert told[-1] == (BASE, size, size)
    counts = [done for _, done, _ in told]
    assert counts == sorted(set(counts))
    assert not utils.are_progress_bars_disabled()


def test_unwatched_the_library_draws_its_own_bars(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with hub.watched(print):
        pass
    hub.snapshot(BASE, ["config.json"])
    assert "Fetching" in capsys.readouterr().err


def test_a_single_file_is_told_of_too(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int, int]] = []
    with hub.watched(lambda *one: told.append(one)):
        path = hub.file(DATA, "data.csv")
    assert path.read_bytes() == LARGE
    assert told[-1] == (DATA, len(LARGE), len(LARGE))
    assert capsys.readouterr() == ("", "")


def test_a_failed_download_gives_the_bars_back() -> None:
    with hub.watched(lambda *_: None), pytest.raises(utils.RepositoryNotFoundError):
        hub.snapshot("made/none", ["*"])
    assert not utils.are_progress_bars_disabled()


def test_a_user_who_wants_no_bars_keeps_none() -> None:
    utils.disable_progress_bars()
    try:
        with hub.watched(lambda *_: None):
            hub.snapshot(BASE, ["config.json"])
        assert utils.are_progress_bars_disabled()
    finally:
        utils.enable_progress_bars()


def test_bars_that_the_environment_forces_are_not_drawn_over_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    told: list[int] = []
    with hub.watched(lambda _name, done, _total: told.append(done)):
        hub.snapshot(BASE, ["config.json"])
    assert told
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_command_shows_downloads_on_a_terminal(
    server: LoopbackHub, tmp_path: Path, quiet: bool
) -> None:
    pytest.importorskip("pty", reason="needs pseudo-terminals, which Windows has not")
    from terminal import run

    environment = server.environment(tmp_path / "other")
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    texts = write_texts(tmp_path / "mail.csv")
    shown = run(
        "eval", "--model", BASE, "--data", texts, "--set=evaluation.queries=4",
        *(["--quiet"] if quiet else []), **environment,
    )  # fmt: skip
    assert shown.status == 0, shown.terminal
    assert "Fetching" not in shown.terminal
    if quiet:
        assert shown.terminal == ""
    else:
        assert f"downloading {BASE} " in shown.text
        assert f"opening {BASE}" in shown.text
        assert shown.screen == []


def test_a_push_is_quiet(tmp_path: Path) -> None:
    from push_support import make_run

    run = make_run(tmp_path)
    quiet = invoke("push", run, "owner/mails", "--base-model", BASE, "--quiet", "--with-peft")
    assert quiet.exit_code == 0, quiet.output
    assert quiet.stderr == ""
    assert quiet.stdout.count("\n") == 1
