"""A few of benchmarks/torture_fuzz.py's cases for every reader, and hypothesis's own for some."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abft_mlx import data, recipe, study
from abft_mlx.errors import UsageError
from abft_mlx.recipe import DataSection

CASES = {"drawing": 3, "study file": 8, "command line": 25}
USUAL = 25
NAMES = (
    "recipe", "--set", "study file", "csv", "tsv", "jsonl", "json", "parquet", "txt", "run folder",
    "drawing", "heads.npz", "study.json", "push", "study folder", "mlx-lm adapter", "PEFT adapter",
    "config.json", "weights", "tokenizer", "chat template", "command line",
)  # fmt: skip


@pytest.fixture(scope="module")
def harness(benchmark: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    """benchmarks/torture_fuzz.py with its alarm on."""
    module = benchmark("torture_fuzz")
    before = signal.signal(signal.SIGALRM, module._alarm)
    yield module
    signal.signal(signal.SIGALRM, before)


def test_every_reader_is_here(harness: ModuleType) -> None:
    assert tuple(harness.ALL) == NAMES
    assert sum(one.share for one in harness.ALL.values()) >= 20_000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_input(
    harness: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in harness.QUIET.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    reader = harness.ALL[name]
    sample = harness.prepared(reader, tmp_path)
    lost = {}
    for number in range(CASES.get(name, USUAL)):
        folder = tmp_path / f"case{number}"
        folder.mkdir()
        wrong = harness.outcome(reader, sample, 0, number, folder)
        if wrong is not None:
            lost[number] = wrong
    assert not lost


class TestTheHarnessItself:
    """It must lose what it says that it loses."""

    @pytest.mark.parametrize(
        ("read", "wrong"),
        [
            (lambda _sample, folder: (_ for _ in ()).throw(UsageError(f"{folder} is bad")), None),
            (lambda _sample, _folder: None, None),
            (lambda _sample, _folder: json.loads("{"), "JSONDecodeError"),
            (lambda _sample, _folder: (_ for _ in ()).throw(UsageError("bad")), "names neither"),
        ],
        ids=["refused", "read", "traceback", "nameless"],
    )
    def test_endings(
        self, harness: ModuleType, tmp_path: Path, read: Any, wrong: str | None
    ) -> None:
        reader = harness.Reader("made", 1, lambda _: None, lambda *_: None, read)
        found = harness.judged(reader, None, tmp_path)
        assert (found is None) if wrong is None else found.startswith(wrong)

    def test_memory(self, checkout: Path, tmp_path: Path) -> None:
        """In a process of its own, and much: a peak that the parent reached counts there, too."""
        script = (
            "import sys, pathlib, torture_fuzz as harness\n"
            "harness.ALARM_SECONDS = 500\n"  # memory is asked about, not a busy machine's time
            "def read(sample, folder): b'x' * 2_500_000_000\n"
            "reader = harness.Reader('made', 1, lambda _: None, lambda *_: None, read)\n"
            "print(harness.judged(reader, None, pathlib.Path(sys.argv[1])))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            cwd=checkout / "benchmarks",
            env={**os.environ, "PYTHONPATH": f"{checkout / 'benchmarks'}{os.pathsep}{checkout}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("took "), done.stdout

    def test_a_hang(
        self, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(harness, "ALARM_SECONDS", 0.05)

        def read(_sample: Any, _folder: Path) -> None:
            while True:
                pass

        reader = harness.Reader("made", 1, lambda _: None, lambda *_: None, read)
        assert harness.judged(reader, None, tmp_path).startswith("took more than")

    def test_a_torn_file(self, harness: ModuleType, tmp_path: Path) -> None:
        def read(_sample: Any, folder: Path) -> None:
            (folder / ".out.12.tmp").write_text("half")
            raise UsageError(f"{folder} is bad")

        reader = harness.Reader("made", 1, lambda _: None, lambda *_: None, read)
        assert harness.judged(reader, None, tmp_path).startswith("left")

    @pytest.mark.parametrize("name", ["recipe", "jsonl", "run folder", "PEFT adapter", "weights"])
    def test_cases_are_read_and_refused(
        self, harness: ModuleType, name: str, tmp_path: Path
    ) -> None:
        reader = harness.ALL[name]
        sample = harness.prepared(reader, tmp_path)
        ended: Counter[bool] = Counter()
        for number in range(40):
            folder = tmp_path / f"case{number}"
            folder.mkdir()
            reader.make(harness.Random(f"9/{name}/{number}"), sample, folder)
            good = False
            with suppress(UsageError):
                reader.read(sample, folder)
                good = True
            ended[good] += 1
        assert ended[True] >= 2
        assert ended[False] >= 5


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_KEYS = st.sampled_from(("data", "prompt", "training", "adapter", "model", "mixture", "evaluation"))
_BOUNDED = settings(
    max_examples=60, database=None, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


class TestHypothesis:
    @_BOUNDED
    @given(st.dictionaries(_KEYS, _JSON, max_size=3))
    def test_recipes_and_studies(self, values: dict[str, Any]) -> None:
        text = json.dumps(values)
        for read in (recipe.loads, study.loads):
            with suppress(UsageError):
                read(text)

    @_BOUNDED
    @given(st.binary(max_size=300), st.sampled_from(("csv", "tsv", "jsonl", "json", "parquet")))
    def test_tables_of_any_bytes(self, tmp_path_factory: Any, content: bytes, kind: str) -> None:
        path = tmp_path_factory.mktemp("any") / f"a.{kind}"
        path.write_bytes(b"text,label\n" + content if kind in ("csv", "tsv") else content)
        with suppress(UsageError):
            data.report(DataSection(source=str(path))).require()

    @_BOUNDED
    @given(st.lists(st.dictionaries(st.sampled_from(("text", "label")), _JSON), max_size=5))
    def test_rows_of_any_values(self, tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
        path = tmp_path_factory.mktemp("any") / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        with suppress(UsageError):
            data.report(DataSection(source=str(path))).require()
