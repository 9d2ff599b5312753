"""The hub's token is in nothing that a push writes, says or raises, however it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import invoke
from loopback_hub import OWNER, LoopbackHub
from push_support import make_run

from abft_mlx import hub as hubs
from abft_mlx.errors import AbftError
from abft_mlx.exchange import push

NAME = "owner/mails"
SECRET = OWNER.removeprefix("hf_")

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub().serving() as server:
        server.enter(monkeypatch, tmp_path / "home", OWNER)
        yield server


# What the hub or something between answers; the words hold the token where {token} stands.
FAULTS = [
    ("GET", "whoami", 401),
    ("POST", "repos/create", 403),
    ("POST", "/commit/", 400),
    ("POST", "/commit/", 412),
    ("POST", "/commit/", 500),
    ("PUT", "/large/", 403),
    ("GET", "whoami", "cut"),
]


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, shown or not."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


@pytest.mark.parametrize(
    ("method", "part", "status"), FAULTS, ids=[f"{part} {status}" for _, part, status in FAULTS]
)
def test_no_error_holds_the_token_and_none_of_the_hubs_own_hangs_on_it(
    method: str, part: str, status: int | str, run: Path, hub: LoopbackHub
) -> None:
    # A server, or a proxy before it, may say what it was told.
    said = f"Bearer {OWNER} at http://user:{OWNER}@example.org/x is not accepted"
    if status == "cut":
        hub.cut(part)
    else:
        hub.fail(method, part, int(status), times=99, **{"X-Error-Message": said})
    parcel = push.pack(run, NAME)
    with pytest.raises(AbftError) as caught:
        push.send(parcel)
    for one in chain(caught.value):
        for told in (str(one), repr(one), repr(one.args), *traceback.format_exception(one)):
            assert SECRET not in told
        assert getattr(one, "response", None) is None
        assert getattr(one, "request", None) is None


@pytest.mark.usefixtures("hub")
def test_a_time_out_is_told_without_its_request(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TransportError(Exception):
        def __init__(self) -> None:
            super().__init__(f"timed out: http://{OWNER}@127.0.0.1/api (authorization: {OWNER})")
            self.request = {"authorization": f"Bearer {OWNER}"}

    def late(*_given: object, **_named: object) -> None:
        raise TransportError

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", late)
    with pytest.raises(AbftError, match="the hub cannot be reached") as caught:
        push.send(push.pack(run, NAME))
    assert all(SECRET not in repr(one) for one in chain(caught.value))
    assert [*chain(caught.value)] == [caught.value]


def test_masking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_short")
    like = "hf_" + "aB3" * 11
    assert hubs.masked(f"x hf_short, {like}!") == "x ***, ***!"
    assert hubs.masked("at https://anna:pass@hub.example/x") == "at https://hub.example/x"
    assert (
        hubs.masked("owner/hf_model and anna@example.org") == "owner/hf_model and anna@example.org"
    )


def test_no_file_of_a_run_holds_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor its evaluation, heads, report or drawings, whatever the environment holds."""
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", OWNER)
    run = make_run(tmp_path)
    for words in (
        ["eval", "--adapter", run],
        ["plot", run, "--output", tmp_path / "figures"],
        ["report", run, "--output", tmp_path / "report.html"],
    ):
        done = invoke(*words)
        assert done.exit_code == 0, done.output
        assert SECRET not in done.output
    assert (run / "eval.json").is_file()
    assert (tmp_path / "report.html").is_file()
    assert SECRET.encode() not in everything(tmp_path)


def everything(folder: Path, but: Path | None = None) -> bytes:
    """The names and contents of all files under a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        found.append(str(path).encode())
        if path.is_file() and path != but:
            found.append(path.read_bytes())
    return b"\0".join(found)


@pytest.mark.parametrize(
    ("source", "status"), [("environment", None), ("file", 401), ("URL", 500), ("URL", None)]
)
def test_a_process_that_pushes_leaves_its_token_nowhere(
    source: str, status: int | None, run: Path, checkout: Path, tmp_path: Path
) -> None:
    home, token_file = tmp_path / "home", None
    (tmp_path / "tmp").mkdir()
    home.mkdir()
    with LoopbackHub().serving() as hub:
        environment = {
            **os.environ, **hub.environment(home), "HOME": str(home),
            "TMPDIR": str(tmp_path / "tmp"), "HF_HUB_VERBOSITY": "warning",
        }  # fmt: skip
        if source == "file":
            token_file = home / "token"
            token_file.write_text(OWNER)
        else:
            environment["HF_TOKEN"] = OWNER
        if source == "URL":
            environment["HF_ENDPOINT"] = hub.url.replace("//", f"//anna:{OWNER}@")
        else:
            environment["HF_DEBUG"] = "1"  # every request, but not its token
        if status is not None:
            said = {"X-Error-Message": f"Bearer {OWNER} is not accepted"}
            hub.fail("POST", "/commit/", status, times=99, **said)
        done = subprocess.run(
            [sys.executable, checkout / "cli.py", "push", run, NAME, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path,
        )  # fmt: skip
    if source != "URL":  # the loopback hub's own links have no login
        assert done.returncode == {None: 0, 401: 2}[status], done.stdout
    secret = SECRET.encode()
    assert secret not in done.stdout
    assert secret not in everything(run.parent)
    assert secret not in everything(tmp_path, but=token_file)
