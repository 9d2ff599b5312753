"""Advisories: found, none, and nobody answered; none of the three passes for another."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("pip_audit", reason="pip-audit (dependency group dev) asks the services")

LOCK = "".join(f"{one}==1.0 \\\n    --hash=sha256:{'0' * 64}\n" for one in ("first", "second"))


def osv_document(package: str) -> dict[str, Any]:
    """What OSV says of a package with one advisory."""
    events = [{"introduced": "0"}, {"fixed": "1.1"}]
    ranges = [{"type": "ECOSYSTEM", "events": events}]
    affected = [{"package": {"name": package, "ecosystem": "PyPI"}, "ranges": ranges}]
    return {"vulns": [{"id": "MADE-UP-1", "summary": "runs texts", "affected": affected}]}


@contextmanager
def osv(found: set[str], status: int = 200) -> Iterator[str]:
    """The address of a server on this machine that plays OSV, with advisories for some."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = asked["package"]["name"]
            body = json.dumps(osv_document(name) if name in found else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()


def closed_address() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "made.lock"
    path.write_text(LOCK, encoding="utf-8")
    return path


def audit(
    checkout: Path, lock: Path, *options: object, accepted: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the script where nothing but this machine is reached."""
    names = lock.parent / "accepted.txt"
    names.write_text(accepted, encoding="utf-8")
    nobody = closed_address()
    environment = os.environ | {"HTTPS_PROXY": nobody, "https_proxy": nobody}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, checkout / "benchmarks/audit_lock.py", "--lock", lock]
    command += ["--accepted", names, *options]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment
    )


def test_none_is_known(checkout: Path, lock: Path) -> None:
    with osv(found=set()) as url:
        done = audit(checkout, lock, "--osv-url", url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no advisory is known (osv) for the 2 packages locked\n"


@pytest.mark.parametrize("options", [[], ["--where-reachable"]])
def test_one_that_is_known_fails(checkout: Path, lock: Path, options: list[str]) -> None:
    with osv(found={"second"}) as url:
        done = audit(checkout, lock, "--osv-url", url, *options)
    first, last = done.stdout.splitlines()
    assert done.returncode == 1
    assert first == "advisory (osv): second 1.0: MADE-UP-1, mended in 1.1"
    assert last.startswith("1 known for what is locked: make lock")


def test_one_that_was_accepted_with_a_reason(checkout: Path, lock: Path) -> None:
    with osv(found={"second"}) as url:
        options = ("--osv-url", url)
        done = audit(checkout, lock, *options, accepted="# why\nMADE-UP-1 no texts are run here\n")
        assert done.returncode == 0, done.stdout
        done = audit(checkout, lock, *options, accepted="MADE-UP-1\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "line 1: MADE-UP-1 has no reason" in done.stderr


@pytest.mark.parametrize(("options", "status"), [([], 3), (["--where-reachable"], 0)])
def test_nobody_answers(checkout: Path, lock: Path, options: list[str], status: int) -> None:
    done = audit(checkout, lock, "--osv-url", closed_address(), *options)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout == "advisories: not reachable: not checked\n"


def test_a_service_in_trouble_is_no_answer(checkout: Path, lock: Path) -> None:
    with osv(found=set(), status=503) as url:
        done = audit(checkout, lock, "--service", "osv", "--osv-url", url)
    assert (done.returncode, done.stdout) == (3, "advisories: not reachable: not checked\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file; make lock writes it"),
        ("", "locks no package; make lock writes it anew"),
        ("# nothing\n", "locks no package; make lock writes it anew"),
        ("first==1.0\n", "was not checked: ERROR"),
        ("first>=1.0 --hash=sha256:" + "0" * 64 + "\n", "was not checked: ERROR"),
    ],
)
def test_what_is_no_lock_is_not_taken_for_silence(
    checkout: Path, lock: Path, text: str | None, words: str
) -> None:
    if text is None:
        lock.unlink()
    else:
        lock.write_text(text, encoding="utf-8")
    done = audit(checkout, lock, "--where-reachable")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_packages_that_a_service_does_not_know_are_not_clean(benchmark: Any) -> None:
    script: ModuleType = benchmark("audit_lock")
    known = {"name": "first", "version": "1.0", "vulns": []}
    skipped = {"name": "second", "skip_reason": "Dependency not found on PyPI"}
    assert script.read({"dependencies": [known]}).whole
    assert not script.read({"dependencies": [known, skipped]}).whole
    assert not script.read({"dependencies": [skipped]}).whole
    assert not script.read({"dependencies": []}).whole


def test_the_first_package_is_asked_for_alone(benchmark: Any, tmp_path: Path) -> None:
    path = tmp_path / "made.lock"
    other = "windows==1 ; sys_platform == 'win32' \\\n    --hash=sha256:00\n"
    path.write_text("# a comment\n" + other + LOCK + other, encoding="utf-8")
    first = benchmark("audit_lock").first_package(path)
    assert first == LOCK[: LOCK.index("second")]
