"""Ctrl-C and SIGTERM: the update is finished and saved, a second one leaves at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_support import invoke
from test_trainer import make_recipe, make_trainer, metrics, same, trained

from abft_mlx.errors import StoppedError
from abft_mlx.events import OnUpdate
from abft_mlx.trainer import RunFolder, Stop, checkpoint

# Tests that run in the background inherit an ignored SIGINT.
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals as a terminal's process has them."""
    before = [(one, signal.getsignal(one)) for one in STATUS]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for one, handler in before:
        signal.signal(one, handler)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 2), (signal.SIGTERM, 3)])
def test_an_update_is_finished_and_saved(tmp_path: Path, number: int, step: int) -> None:
    whole = make_trainer(make_recipe("adapter.dropout=0.1"), fingerprint="a")
    whole.run()
    folder = RunFolder(tmp_path / "run")
    folder.create()
    lines: list[str] = []
    stop = Stop(lines.append)

    def ask(update: Any) -> None:
        if update.step == step:
            os.kill(os.getpid(), number)

    def trainer(**options: Any) -> Any:
        recipe = make_recipe("adapter.dropout=0.1")
        return make_trainer(recipe, folder, fingerprint="a", stop=stop, **options)

    with stop.watching(), pytest.raises(StoppedError) as caught:
        trainer(events=OnUpdate(ask)).run()
    assert caught.value.exit_status == STATUS[signal.Signals(number)]
    assert len(lines) == 1
    assert lines[0].startswith("finishing this update")
    assert [one["step"] for one in metrics(folder)] == list(range(1, step + 1))
    held = checkpoint.load(folder.checkpoint_path)
    assert held.facts["progress"]["updates"] == step
    stop.number = None
    resumed = trainer()
    resumed.run(resume=True)
    assert same(trained(resumed.model), trained(whole.model))


def test_where_no_update_goes_on_it_ends_at_once_and_handlers_return() -> None:
    before = [signal.getsignal(one) for one in STATUS]
    for number in STATUS:
        lines: list[str] = []
        stop = Stop(lines.append)
        with pytest.raises(StoppedError) as caught, stop.watching():  # noqa: PT012
            assert [signal.getsignal(one) for one in STATUS] != before
            os.kill(os.getpid(), number)
            pytest.fail("went on")
        assert caught.value.exit_status == STATUS[number]
        assert lines == []
        assert [signal.getsignal(one) for one in STATUS] == before


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = Stop()
    with stop.watching():
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.number is None
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


# A call that runs no handler of Python's for a long while, as MLX may.
BUSY = """
import hashlib, os, sys
from abft_mlx.trainer import Stop
stop = Stop(lambda line: print(line, flush=True))
with stop.watching(), stop.deferred():
    os.kill(os.getpid(), int(sys.argv[1]))
    assert stop.number == int(sys.argv[1])
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_the_second_leaves_at_once_even_out_of_a_long_call(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(int(number))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("finishing this update")
        assert process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    # What a shell has as 130 or 143.
    assert process.returncode == -number


def test_a_whole_command_ends_so_that_it_can_go_on(
    model: Path, texts: Path, tmp_path: Path, checkout: Path
) -> None:
    folder = tmp_path / "my run"
    words = [
        "finetune", "--model", model, "--data", texts, "--output", folder, "--json",
        "--set=objective.filter=false", "--set=training.updates=100000",
        "--set=training.examples=8", "--set=training.prompts_per_update=4",
        "--set=prompt.demonstrations=2", "--set=training.checkpoint_every=100000",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(checkout / "cli.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 300
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.endswith(f"to go on: abft-mlx finetune --resume '{folder}'\nerror: interrupted\n")
    assert json.loads(out)["error"] == {
        "kind": "Interrupted",
        "message": "interrupted",
        "problems": [],
    }
    held = checkpoint.load(folder / "checkpoint")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert held.facts["progress"]["updates"] == len(lines) > 0
    assert not (folder / "run.lock").exists()
    assert invoke("finetune", "--resume", folder, "--set=training.updates=1").exit_code == 2
