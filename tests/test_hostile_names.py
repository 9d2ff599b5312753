"""Links in what is sent, and names in what is fetched, that lead out of their folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import invoke
from loopback_hub import LoopbackHub
from push_support import make_run

from abft_mlx import loading
from abft_mlx.errors import ModelError
from abft_mlx.exchange import push

NAME = "owner/mails"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.mark.parametrize("name", [*push.ALLOWED, "demonstrations.jsonl"])
def test_no_file_that_is_sent_may_be_a_link(name: str, run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    if (run / name).exists():
        shutil.move(run / name, secret)
    else:
        secret.write_text("private")
    for target in (secret, "../secret", tmp_path / "nowhere"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)
        done = invoke("push", run, NAME, "--dry-run", "--with-demonstrations")
        assert done.exit_code == 2, done.output
        assert f"{name} is a link" in done.stderr
        assert done.stderr.count("\n") == 1


def test_what_is_not_a_file_is_refused(run: Path) -> None:
    (run / "README.md").mkdir()
    done = invoke("push", run, NAME, "--dry-run")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "README.md" in done.stderr


def test_a_linked_folder_is_the_users_word_and_one_within_is_not_looked_into(
    run: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "adapter_model.safetensors").write_bytes(b"private")
    (run / "peft").symlink_to(outside)
    (tmp_path / "link").symlink_to(run)
    assert push.pack(tmp_path / "link", NAME).sizes() == push.pack(run, NAME).sizes()
    assert not [one for one in push.pack(run, NAME).files if one.startswith("peft")]


LEADS_OUT = ["../x.json", "/etc/x.json", "a/../../x.json", "x\0.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub().serving() as server:
        server.enter(monkeypatch, tmp_path / "deep" / "home")
        yield server


@pytest.mark.parametrize("number", range(len(LEADS_OUT)), ids=lambda n: repr(LEADS_OUT[n][:20]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_repositorys_names_lead_nowhere_else(
    number: int, hub: LoopbackHub, tmp_path: Path
) -> None:
    # A cache knows a repository by its name and commit, so each has its own.
    name, leads_out = f"owner/model{number}", LEADS_OUT[number]
    files_there = {"config.json": b'{"model_type": "llama"}', leads_out: b"{}"}
    hub.add(name, files_there)
    with pytest.raises(ModelError, match=f"model {name} could not be fetched: "):
        loading.load_model(name)
    result = invoke("eval", "--model", name, "--data", "generated/emotion")
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["deep"]
    outside = [one for one in (tmp_path / "deep").rglob("*") if "hub" not in one.parts]
    assert [one.name for one in outside] == ["home"]
    assert not Path("/etc/x.json").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nor_do_those_of_a_data_set(hub: LoopbackHub, tmp_path: Path) -> None:
    for number, leads_out in enumerate(LEADS_OUT[:4]):
        name = f"owner/set{number}"
        there = {leads_out.replace(".json", ".csv"): b"text,label\na,b\n"}
        hub.add(name, there, repo_type="dataset")
        result = invoke("eval", "--model", "demo", "--data", name)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("error: ") == 1
        assert "Traceback" not in result.stderr
    assert hub.sent("GET", "/api/datasets/owner/set3")
    assert {one.name for one in tmp_path.iterdir()} <= {"deep"}
    assert not Path("/etc/x.csv").exists()
