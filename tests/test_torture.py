"""A few real kills, and a real limit on files; ``make torture`` does many."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from cli_support import invoke

from abft_mlx.trainer import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="too slow where processes are not forked")
def test_kills_lose_nothing(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, checkout / "benchmarks" / "torture_kill.py", "--kills", "4"],
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill: tried 4, survived 4, lost 0\n" in done.stdout
    kinds = re.findall(r"([a-z -]+) (\d+)", done.stdout.splitlines()[0].partition(":")[2])
    assert sum(int(count) for _, count in kinds) == 4


STAND_INS = {
    "fine": "print('fine: tried 1,200, survived 1,200, lost 0')",
    "lossy": "print('lossy: tried 3, survived 2, lost 1'); raise SystemExit(1)",
    "mute": "raise SystemExit(0)",
    "endless": "import time; print('begun', flush=True); time.sleep(60)",
}


def test_the_table_has_a_row_for_each_harness_and_counts_what_does_not_end(
    benchmark: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str]
) -> None:
    driver = benchmark("torture")
    rows = [
        driver.run(name, [sys.executable, "-c", program], 60 if name != "endless" else 1)
        for name, program in STAND_INS.items()
    ]
    assert [one.fine for one in rows] == [True, False, False, False]
    shown = [line.rpartition("|")[0].rpartition("|")[0] for line in driver.table(rows).splitlines()]
    assert shown == [
        "| harness | tried | survived | lost ",
        "|---|---:|---:|---:",
        "| fine | 1,200 | 1,200 | 0 ",
        "| lossy | 3 | 2 | 1 ",
        "| mute | ? | ? | ? ",
        "| endless | ? | ? | ? ",
        "| all | 1,203 | 1,202 | 1 ",
    ]
    printed = capfd.readouterr().out
    assert "begun\n" in printed
    assert "endless was ended after" in printed


def test_a_round_is_under_half_an_hour(benchmark: Callable[[str], ModuleType]) -> None:
    assert sum(one.seconds for one in benchmark("torture").HARNESSES) < 30 * 60


def test_one_table_of_all_harnesses(checkout: Path) -> None:
    driver = checkout / "benchmarks" / "torture.py"
    done = subprocess.run(
        [sys.executable, driver, "--short", "--only", "fuzz", "--only", "disk"],
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("| harness |")[2]
    assert re.search(r"^\| disk \| (\d+) \| \1 \| 0 \| \d+ \|$", table, re.MULTILINE)
    assert re.search(r"^\| fuzz \| (\d+) \| \1 \| 0 \| \d+ \|$", table, re.MULTILINE)


def test_a_file_that_may_not_grow_ends_a_run_in_one_line_and_loses_nothing(
    model: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = [
        "finetune", "--model", model, "--data", texts, "--set=objective.filter=false",
        "--set=training.updates=6", "--set=training.checkpoint_every=2",
        "--set=training.examples=8", "--set=training.prompts_per_update=4",
        "--set=prompt.demonstrations=2",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert invoke(*arguments, "--output", whole).exit_code == 0
    state = whole / "checkpoint" / checkpoint.FILE_NAME
    # Within a checkpoint, and then, as it begins again, within run.json.
    for limit in (state.stat().st_size // 2, 300):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            goes_on = ("finetune", "--resume", cut)
            result = invoke(*(goes_on if cut.exists() else (*arguments, "--output", cut)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert result.exit_code == 1, result.output
        assert result.stderr.count("error: ") == 1
        assert "run again" in result.stderr.splitlines()[-1]
        assert not (cut / "run.lock").exists()
        assert not [one for one in cut.rglob("*") if one.name.startswith(".")]
    assert invoke("finetune", "--resume", cut).exit_code == 0
    for name in ("adapters.safetensors", "recipe.yaml"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert (cut / "metrics.jsonl").read_bytes().count(b"\n") == 6
