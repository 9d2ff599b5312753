"""Stock mlx-lm, started as its users start it, answers with the adapter's label."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from export_support import answers, asked, base_folder, export, stock, train
from mlx_lm import server

WAIT_SECONDS = 60


class Question:
    """A prompt that base and adapter answer with different labels."""

    def __init__(self, run: Path) -> None:
        prompts, labels, tokenizer = asked(run)
        plain, adapted = (
            answers(stock(base_folder(), one), prompts).argmax(axis=1) for one in (None, run)
        )
        whole = {one: tokenizer.decode([one]) for one in labels}
        differing = [
            n for n in range(len(prompts))
            if plain[n] != adapted[n] and plain[n] in labels and adapted[n] in labels
        ]  # fmt: skip
        self.text = tokenizer.decode(prompts[differing[0]])
        assert tokenizer.encode(self.text) == prompts[differing[0]]
        self.label = whole[adapted[differing[0]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def question(run: Path) -> Question:
    return Question(run)


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for kind in ("mlx", "peft"):
        export(run, kind, folder / kind, "--no-measure")
    # The way back from PEFT.
    export(folder / "peft", "mlx", folder / "back", "--model", "demo", "--no-measure")
    return {one.name: one for one in folder.iterdir()}


def generated(text: str, *options: object) -> str:
    """The next token in the words of ``mlx_lm.generate``."""
    done = subprocess.run(
        [
            sys.executable, "-m", "mlx_lm", "generate", *map(str, options), "--prompt", "-",
            "--max-tokens", "1", "--temp", "0", "--ignore-chat-template", "--verbose", "False",
        ],
        input=text, capture_output=True, text=True, timeout=WAIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate(question: Question, exports: dict[str, Path]) -> None:
    options = ("--model", base_folder(), "--adapter-path", exports["back"])
    assert generated(question.text, *options).strip() == question.label.strip()


@contextmanager
def served(folder: Path, *options: object) -> Iterator[str]:
    """The address of a ``mlx_lm.server`` on loopback, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "mlx_lm", "server", *map(str, options),
                "--host", "127.0.0.1", "--port", str(port),
            ],
            stdout=output, stderr=output, env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + WAIT_SECONDS
            while not answering(address):
                said = log.read_text()
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait()


def answering(address: str) -> bool:
    try:
        with opened(f"{address}/health"):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def opened(request: str | urllib.request.Request) -> object:
    # A machine's proxy has no business with loopback.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return direct.open(request, timeout=WAIT_SECONDS)


def completed(address: str, text: str) -> str:
    """The next token in the words of the server."""
    body = {"prompt": text, "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with opened(request) as answer:  # type: ignore[attr-defined]
        return json.loads(answer.read())["choices"][0]["text"]


def test_server(question: Question, exports: dict[str, Path], tmp_path: Path) -> None:
    loads = inspect.getsource(server.ModelProvider.load)
    if loads.index("_model_map.get(") < loads.index("_adapter_map.get("):
        pytest.skip("the installed mlx-lm's server forgets its own --adapter-path")
    options = ("--model", base_folder(), "--adapter-path", exports["mlx"])
    with served(tmp_path, *options) as address:
        assert completed(address, question.text).strip() == question.label.strip()
