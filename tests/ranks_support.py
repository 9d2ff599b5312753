"""Several processes on this machine, joined by MLX's ring, and what they work on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from cli_support import write_model, write_texts

PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny")
    weights = mx.load(str(folder / "model.safetensors"))
    # Sharper attention: a head passes the filter in some of these prompts.
    mx.random.seed(2)
    sharper = {
        name: 1.3 * mx.random.normal(one.shape) if "q_proj" in name or "k_proj" in name else one
        for name, one in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), sharper, metadata={"format": "mlx"})
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "mail.csv")


class Job:
    """Processes started as ``mlx.launch --backend ring`` starts them, each within reach."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, size: int, *arguments: object, **environment: str) -> None:
        """Start all ranks of a job."""
        sockets = [socket.socket() for _ in range(size)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
        for one in sockets:
            one.close()
        file = self._folder / "hosts.json"
        file.write_text(json.dumps(hosts), encoding="utf-8")
        shared = {**os.environ, "MLX_HOSTFILE": str(file), "USE_TORCH": "0"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env={**shared, **environment, "MLX_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def end(self, rank: int) -> tuple[int, str, str]:
        """Wait for a rank: its exit status, standard output and standard error."""
        process = self.processes[rank]
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, out, err


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    for process in job.processes:
        process.kill()
        process.communicate()
