"""benchmarks/mutants.py on made-up results of mutmut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def summary(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("mutants")


def write(folder: Path, name: str, codes: list[int | None]) -> None:
    path = folder / "abft_mlx" / f"{name}.meta"
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = {f"abft_mlx.x_{n}__mutmut_1": code for n, code in enumerate(codes)}
    path.write_text(json.dumps({"exit_code_by_key": keys, "durations_by_key": {}}))


def test_rooms_are_counted_and_all_but_deaths_count_against_them(
    summary: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "prompts/chat.py", [1] * 15 + [0, 33])
    write(tmp_path, "prompts/deep/one.py", [3, 36])
    write(tmp_path, "prompts/__init__.py", [])
    write(tmp_path, "errors.py", [])
    # 17 of 20 are 85%, which is enough.
    write(tmp_path, "prompts/builder.py", [255])
    write(tmp_path, "objective.py", [1, -24, 0, 5, -11, None])
    write(tmp_path, "adapters/lora.py", [None, None])
    (tmp_path / "abft_mlx" / "objective.py").write_text("pass")
    (tmp_path / "other").mkdir()
    assert summary.main(["--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "| package | mutants | killed | timeout | survived | no tests | other | untried | share |",
        "|---|---|---|---|---|---|---|---|---|",
        "| objective | 6 | 1 | 1 | 1 | 1 | 1 | 1 | 33.3% |",
        "| prompts | 20 | 16 | 1 | 1 | 1 | 1 | 0 | 85.0% |",
        "untried: adapters",
        "below 85%: objective; mutmut results names those left",
    ]
    write(tmp_path, "objective.py", [1] * 6)
    assert summary.main(["--folder", str(tmp_path)]) == 0
    assert "below" not in capsys.readouterr().out
    write(tmp_path, "prompts/builder.py", [255, 0])
    assert summary.main(["--folder", str(tmp_path)]) == 1


def test_without_results_one_line_says_what_to_do(
    summary: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summary.main(["--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds no results of mutmut; run make mutants\n"
    )
    write(tmp_path, "objective.py", [None])
    assert summary.main(["--folder", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
    for text in ("{", "[]", '{"exit_code_by_key": []}', "{}"):
        (tmp_path / "abft_mlx" / "objective.py.meta").write_text(text)
        assert summary.main(["--folder", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / 'abft_mlx' / 'objective.py.meta'}: is no")
        assert error.count("\n") == 1
