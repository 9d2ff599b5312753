"""Every command and every usual import loads an optimised BLAS before MLX, in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a Mac's MLX has its own BLAS")

# Stops a process at its first import of MLX, and says whether a fast BLAS is loaded by then.
WATCH = """
import importlib.abc, os, re, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core":
            maps = open("/proc/self/maps").read()
            print("fast" if re.search("libopenblas|libmkl_rt", maps) else "slow", flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""
IMPORTS = (
    "from abft_mlx import load; load('demo')",
    "import abft_mlx; abft_mlx.attention",
    "import abft_mlx.attention",
    "from abft_mlx import prefix",
    "from abft_mlx.trainer import Trainer",
    "from abft_mlx.ports import port_for",
    "from abft_mlx.induction import HeadCensus",
    "from abft_mlx.evaluation import label_probabilities",
    "from abft_mlx.prediction import Predictor",
    "from abft_mlx.study import load",
    "from abft_mlx.adapters import attach",
    "from abft_mlx import Classifier",
    "from abft_mlx.analysis import look; look('.')",
)
COMMANDS = (
    "demo --output {tmp}/run",
    "finetune demo --output {tmp}/run",
    "eval demo",
    "eval --model demo --data demo",
    "predict demo {texts}",
    "heads demo",
    "export {tmp}/run --to mlx --output {tmp}/out",
    "push {tmp}/run owner/name --dry-run",
    "plot {tmp}/run",
    "report {tmp}/run",
    "study small --output {tmp}/study",
    "bench",
    "doctor",
)


def first_import(program: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WATCH + program], capture_output=True, text=True, cwd=cwd
    )
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("program", IMPORTS)
def test_imports(program: str, tmp_path: Path) -> None:
    assert first_import(program, tmp_path) == "fast"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one.split(" --")[0])
def test_commands(command: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("where is my order\n")
    arguments = command.format(tmp=tmp_path, texts=texts).split()
    program = f"from abft_mlx.cli import app\napp({arguments!r})"
    assert first_import(program, tmp_path) == "fast"


def test_a_slow_blas_is_one_line_of_every_long_command(tmp_path: Path) -> None:
    program = "from abft_mlx.cli import app\napp(['eval', 'nosuch'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"ABFT_MLX_BLAS": "none", "PATH": "/usr/bin"},
    )
    warning, error = done.stderr.splitlines()
    assert "reference BLAS" in warning
    assert "OpenBLAS" in warning
    assert error.startswith("error:")
    assert done.returncode == 2
