"""Every command of the guides is run, in order, in a folder of its own.

Two kinds of block say in their first line what is not run as it stands: in those that name a model
of the hub the bundled one takes its place, and those that read data of the hub are only parsed.
"""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from abft_mlx import recipe
from abft_mlx.cli import app
from abft_mlx.data import generated

GUIDES = sorted(path.stem for path in (Path(__file__).parents[1] / "docs/guides").glob("*.md"))
REPLACED = "# A model of the hub; the tests put the bundled one in its place."
PARSED = "# Reads the hub; the tests only check that the commands can be read."
HUB_MODEL = re.compile(r"(?:mlx-community|openai-community)/[\w.-]+")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# So that a guide takes seconds. What it sets itself comes later and has the last word.
SIZES = {
    "finetune": ("training.updates=2", "training.examples=16", "training.prompts_per_update=8"),
    "eval": (
        "evaluation.queries=8",
        "evaluation.calibration_prompts=8",
        "evaluation.bootstrap_samples=50",
    ),
}


def blocks(guide: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return BLOCK.findall(guide.read_text(encoding="utf-8"))


def run(line: str, content: bytes | None = None) -> None:
    """Run one ``abft-mlx`` command in this process."""
    _, command, *rest = shlex.split(line)
    sizes = [f"--set={one}" for one in SIZES.get(command, ())]
    result = CliRunner().invoke(app, [command, *sizes, *rest], input=content)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    assert result.stdout.strip(), f"{line} printed nothing"


def parse(line: str) -> None:
    """See that a command's arguments are understood and its recipe takes its settings."""
    _, command, *rest = shlex.split(line)
    group: Any = typer.main.get_command(app)
    parsed = group.commands[command].make_context(command, rest).params
    name = parsed.get("recipe") or parsed["run_or_recipe"]
    recipe.load(name, parsed["settings"] or ())


def shell(block: str) -> int:
    """Do what a block of shell lines says; how many commands there were."""
    first, *_ = lines = block.splitlines()
    assert bool(HUB_MODEL.search(block)) is (first in (REPLACED, PARSED)), f"mark it: {block}"
    count = 0
    for line in lines:
        if line.startswith("#"):
            continue
        count += 1
        if first == PARSED:
            parse(line)
            continue
        line = HUB_MODEL.sub("demo", line)
        before, pipe, after = line.rpartition(" | ")
        if line.startswith("pip install "):
            check_extras(line)
        elif pipe:
            made = subprocess.run(["bash", "-c", before], capture_output=True, check=True)
            run(after, made.stdout)
        else:
            run(line)
    return count


def check_extras(line: str) -> None:
    """A line of pip is not run: it names this project, and extras that there are."""
    named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", shlex.split(line)[-1])
    assert named, line
    extras = set(filter(None, (named[1] or "").split(",")))
    assert extras <= set(metadata("abft-mlx").get_all("Provides-Extra"))


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_runs(
    name: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = generated.TASKS["urgency"].labels
    rows = generated.generate("urgency", 60, 5)
    table = "".join(f"{text},{labels[label]}\n" for text, label in rows)
    Path("mails.csv").write_text("text,label\n" + table, encoding="utf-8")
    Path("new.txt").write_text("".join(f"{text}\n" for text, _ in rows[:4]), encoding="utf-8")
    new = "".join(f"{number},{text}\n" for number, (text, _) in enumerate(rows[:4]))
    Path("new.csv").write_text("id,text\n" + new, encoding="utf-8")
    names: dict[str, Any] = {}
    commands = 0
    for language, block in blocks(checkout / "docs" / "guides" / f"{name}.md"):
        if language == "sh":
            commands += shell(block)
        elif language == "python":
            exec(compile(block, f"{name}.md", "exec"), names)
        elif language == "yaml":
            Path(block.split("\n", 1)[0].removeprefix("# ")).write_text(block, encoding="utf-8")
        else:
            assert language == "text", f"a block of {language} is neither run nor shown"
    assert commands
    if name == "python":
        assert names["accuracy"] > 0.4
        assert names["after"].mean() >= names["before"].mean()
        assert len(names["patterns"]) == len(names["on_labels"])
        assert names["change"].shape == names["to_right"].shape == names["repeats"].shape
        assert Path("runs/attention.png").read_bytes().startswith(b"\x89PNG")
    if name == "your-data":
        with Path("labels.csv").open(encoding="utf-8", newline="") as stream:
            labelled = list(csv.DictReader(stream))
        assert [row["id"] for row in labelled] == ["0", "1", "2", "3"]
        assert {row["label"] for row in labelled} <= set(labels)
    if name == "paper":
        assert "McNemar" in Path("runs/mine/table.md").read_text(encoding="utf-8")
