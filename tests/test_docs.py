"""What the pages say is there: links, modules in order, commands and their flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from cli_support import invoke

from abft_mlx.cli import app

# Pages whose commands are not run by test_guides.py.
WITH_COMMANDS = ("README.md", "docs/reference.md", "docs/prediction.md", "docs/sharing.md")


def pages(checkout: Path) -> list[Path]:
    """Every Markdown page that the repository has."""
    return [*checkout.glob("*.md"), *(checkout / "docs").rglob("*.md")]


def test_links_lead_somewhere(checkout: Path) -> None:
    found = pages(checkout)
    assert len(found) > 15
    missing = [
        f"{page.relative_to(checkout)}: {target}"
        for page in found
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not target.startswith(("https://", "#"))
        and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert not missing


def test_pages_name_nothing_that_readers_do_not_have(checkout: Path) -> None:
    for page in pages(checkout):
        text = page.read_text(encoding="utf-8")
        absent = r"DESIGN\.md|protocol\.md|\.\./shared|/(?:work|home|Users)/"
        assert not re.findall(absent, text), page


def test_the_readme_lists_every_command(checkout: Path) -> None:
    page = (checkout / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `abft-mlx ([a-z]+)`", page, flags=re.MULTILINE)
    group: Any = typer.main.get_command(app)
    assert sorted(listed) == sorted(group.commands)


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_and_flags_exist(name: str, checkout: Path) -> None:
    text = (checkout / name).read_text(encoding="utf-8")
    used = re.findall(r"abft-mlx ([a-z]+)([^|`\n]*)", text)
    assert used
    for command, rest in used:
        page = invoke(command, "--help").stdout
        for flag in re.findall(r"--[a-z][a-z-]*", rest):
            assert flag in page, f"{name}: abft-mlx {command} has no {flag}"
