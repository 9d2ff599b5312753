"""What the README says is there: links, rooms in order, commands and their flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cli_support import invoke
from test_imports import ROOMS

LATER_ROOMS: set[str] = set()


@pytest.fixture(scope="module")
def readme(checkout: Path) -> str:
    return (checkout / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/LOG.md",
        "docs/studies.md",
        "docs/memory.md",
        "docs/mutants.md",
        "docs/reliability.md",
        "docs/prediction.md",
        "docs/report.md",
        "docs/publish.md",
        "SECURITY.md",
        "docs/security.md",
        "docs/ports.md",
        "docs/performance.md",
        "docs/distributed.md",
        "docs/tracking.md",
        "docs/index.md",
        "docs/guides/your-data.md",
        "docs/guides/paper.md",
        "docs/guides/python.md",
        "docs/exchange.md",
        "docs/heads.md",
        "docs/gallery.md",
        "docs/figures.md",
    ],
)
def test_links_lead_somewhere(name: str, checkout: Path) -> None:
    page = checkout / name
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    missing = [
        target
        for target in targets
        if not target.startswith("https://") and not (page.parent / target).exists()
    ]
    assert not missing


def test_rooms_are_listed_in_their_order(readme: str, checkout: Path) -> None:
    listed = re.findall(r"^\| \[`(\w+)/?`\]\(abft_mlx/", readme, flags=re.MULTILINE)
    assert listed == list(ROOMS)
    package = {
        path.stem
        for path in (checkout / "abft_mlx").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert package - {"__init__"} == set(ROOMS)


def test_commands_and_flags_exist(readme: str) -> None:
    commands = set(re.findall(r"abft-mlx ([a-z]+)", readme))
    assert commands == {
        "demo", "finetune", "eval", "predict", "export", "push", "study", "plot", "report",
        "recipes", "bench", "doctor", "heads",
    }  # fmt: skip
    for command in commands:
        lines = [line for line in readme.splitlines() if f"abft-mlx {command}" in line]
        page = invoke(command, "--help").stdout
        for flag in set(re.findall(r"--[a-z-]+", "\n".join(lines))):
            assert flag in page, f"abft-mlx {command} has no {flag}"


def test_the_ports_example_runs(checkout: Path) -> None:
    page = (checkout / "docs" / "ports.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "docs/ports.md", "exec"), names)
    layers = len(names["shapes"])
    assert len(names["rows"]) == len(names["inputs"]) == layers
    assert names["logits"].shape == (1, 2)
    assert len(names["slices"]) == 2 * layers
