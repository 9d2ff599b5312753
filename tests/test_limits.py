"""A limit on a process's memory: seen before MLX meets it, and told in one line."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import invoke

from abft_mlx import limits, loading, recipe, runtime
from abft_mlx.errors import ModelError, RunError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits on memory need Linux")


@pytest.fixture
def room() -> Iterator:
    """Limits the address space to so much more than what is taken."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def limited(more_bytes: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))

    yield limited
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_without_a_limit_nothing_is_looked_at() -> None:
    assert limits.room_bytes() is None
    assert not limits.is_tight()
    limits.check_opening(1 << 60, "model x")
    limits.check_batch()


def test_what_is_left_is_told(room) -> None:
    room(500_000_000)
    left = limits.room_bytes()
    assert left is not None
    assert 450_000_000 < left <= 500_000_000
    assert not limits.is_tight()
    limits.check_batch()
    with pytest.raises(RunError, match=r"the process's limit leaves it \d+ MB and opening model x"):
        limits.check_opening(0, "model x")
    room(30_000_000)
    assert limits.is_tight()
    with pytest.raises(RunError, match="and the next batch may take 64 MB; raise the limit"):
        limits.check_batch()
    limits.check_batch(50_000_000)


def test_a_limit_on_data_is_one_too() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, before[1]))
        left = limits.room_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert left is not None
    assert 0 < left < 1 << 40


def test_a_model_is_not_opened_where_it_cannot_be(model: Path, room) -> None:
    room(400_000_000)
    with pytest.raises(RunError, match="opening model"):
        loading.load_model(str(model))


# Idle; spinning in the system; computing for longer than the watch is patient.
STATES = [
    ("time.sleep(20)", 1),
    ("end = time.time() + 20\nwhile time.time() < end: data.read(1 << 20)", 1),
    ("end = time.process_time() + 3\nwhile time.process_time() < end: sum(range(1000))", 0),
]


@pytest.mark.parametrize(("state", "status"), STATES, ids=["waits", "spins", "computes"])
@pytest.mark.parametrize("limited", [True, False])
def test_a_process_that_waits_for_memory_is_ended(state: str, status: int, limited: bool) -> None:
    if not limited:
        state, status = state.replace("20", "2"), 0
    program = (
        "import os, resource, time\n"
        "from abft_mlx import limits\n"
        "limits.PATIENCE_SECONDS = 1.0\n"
        "data = open('/dev/zero', 'rb', buffering=0)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        f"if {limited}: resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 200_000_000, -1))\n"
        "with limits.watching(lambda line: print(line, flush=True)):\n"
        + "".join(f"    {line}\n" for line in state.splitlines())
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("waits for it without end" in done.stdout) == bool(status)


def test_what_computing_is() -> None:
    assert limits.computes(2.9, 0.1, 3.0)
    assert limits.computes(1.0, 1.0, 3.0)
    assert not limits.computes(0.1, 0.0, 3.0)
    assert not limits.computes(0.4, 2.6, 3.0)


def test_one_that_waits_and_has_room_is_left_alone() -> None:
    program = (
        "import resource, time\n"
        "from abft_mlx import limits\n"
        "limits.PATIENCE_SECONDS = 0.5\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 42, -1))\n"
        "with limits.watching(print):\n"
        "    time.sleep(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


CAUSES = [
    MemoryError(),
    RuntimeError("can't start new thread"),
    ImportError("x.so: failed to map segment from shared object"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("cause", CAUSES, ids=lambda one: type(one).__name__)
def test_memory_is_the_reason_however_it_is_wrapped(
    cause: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_name: object) -> None:
        try:
            raise cause
        except Exception as error:
            raise ModelError("the tokenizer cannot be opened") from error

    monkeypatch.setattr(recipe, "find", fail)
    assert runtime.out_of_memory(cause)
    result = invoke("recipes", "show", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: out of memory: ")
    assert result.stderr.endswith(f"; {limits.WAYS_OUT}\n")


def test_what_a_library_in_want_of_memory_raises_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, room
) -> None:
    def fail(_name: object) -> None:
        raise SystemError("error return without exception set")

    monkeypatch.setattr(recipe, "find", fail)
    room(150_000_000)
    result = invoke("recipes", "show", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: out of memory: SystemError: error return without")
