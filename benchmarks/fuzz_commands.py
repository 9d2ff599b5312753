"""Command lines out of every command's own options, with values that may suit them or not.

Models named here lack their weights, so that a line which is right costs no training.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations as damage
from fuzz_readers import Reader

_FOLDER = "FOLDER"
_VALUES = (
    "0", "1", "-1", "2.5", "1e999", "nan", "9" * 30, "9" * 5000, "", " ", "a", "a=b", "a.b=c",
    "=", "true",
    "training.updates=0", "data.seed=[", "prompt.demonstrations=1e99", "adapter.rank=" + "[" * 3000,
    "svg", "svg,gif", ",", "page", "1/2", "2/1", "0/0", "\u0663/\u0664", "demo", "trec",
    "owner/name@", "@", "a/b/c",
    "\x00", "a\x00b", "\ud800", "\u202e😀", "x" * 5000, "-", "--", "--json", "../..", "/",
    "/dev/null", ".",
    *(f"{_FOLDER}/{name}" for name in (
        "", "texts.csv", "bad.csv", "model", "run", "recipe.yaml", "missing", "missing.yaml",
        "study.json",
        "out.html", "texts.csv/inside", "bad.npz", "a/b/c.csv", "adapter", "out.npz", "bad.jsonl",
    )),
)  # fmt: skip
# What they do cannot be cut short by bad input alone, so one of their values is always wrong.
_ALWAYS_WRONG = {"demo": ["--set", "training.updates=none"], "bench": ["--layers", "none"]}
_SLOW = ("doctor",)


def _prepare(folder: Path) -> dict[str, Any]:
    from report_support import evaluation, made_heads, write_run
    from typer.main import get_command

    from abft_mlx.cli import app

    write_run(folder / "run", made_heads(2, 1, tokens=8, examples=1), measured=evaluation())
    (folder / "run" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "texts.csv").write_text("text,label\ngood,ham\nbad,spam\n" * 1, encoding="utf-8")
    for name in ("bad.csv", "bad.npz", "bad.jsonl", "study.json", "recipe.yaml"):
        (folder / name).write_bytes(b"\xff\x00{[\n")
    group: Any = get_command(app)
    commands = {(name,): one for name, one in group.commands.items() if name not in _SLOW}
    inner: Any = commands.pop(("recipes",))
    commands |= {("recipes", name): one for name, one in inner.commands.items()}
    options = {
        name: [
            (one.opts, one.secondary_opts, bool(getattr(one, "is_flag", False)))
            for one in command.params
            if one.param_type_name == "option" and one.name not in ("help", "version")
        ]
        for name, command in commands.items()
    }
    return {"folder": folder, "options": options}


def _make(rng: Random, sample: dict[str, Any], folder: Path) -> None:
    name = rng.choice(list(sample["options"]))
    line = list(name)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        line.append(_value(rng, sample))
    for opts, others, flag in rng.sample(sample["options"][name], k=min(
        len(sample["options"][name]), rng.choice((0, 1, 2, 3, 6))
    )):  # fmt: skip
        line.append(rng.choice([*opts, *others]))
        if not flag:
            line.append(_value(rng, sample))
    if rng.random() < 0.05:
        line.append(rng.choice(("--no-such", "-Z", "--jsonn", "--", "--set")))
    line += _ALWAYS_WRONG.get(name[0], [])
    (folder / "line.json").write_text(json.dumps(line), encoding="utf-8")


def _value(rng: Random, sample: dict[str, Any]) -> str:
    text = rng.choice(_VALUES).replace(_FOLDER, str(sample["folder"]))
    if rng.random() < 0.1:
        text = damage.octets(rng, text.encode("utf-8", "replace"), 1).decode("utf-8", "replace")[
            :2000
        ]
    return text


def _read(sample: dict[str, Any], folder: Path) -> None:
    from typer.testing import CliRunner

    from abft_mlx.cli import app
    from abft_mlx.errors import UsageError

    line = json.loads((folder / "line.json").read_text(encoding="utf-8"))
    del sample
    result = CliRunner().invoke(app, line)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 0:
        return
    offline = result.exit_code == 1 and "hub cannot be reached" in result.stderr
    status = result.exit_code
    assert status == 2 or offline, f"exit status {status}: {result.stderr[-300:]}"
    told = result.stderr.splitlines()
    assert sum(one.lower().startswith("error") for one in told) >= 1, f"no one line: {told[:5]}"
    ours = [one for one in told if one.startswith("error: ")]
    assert all(one.isprintable() for one in ours), f"control characters: {told[:5]}"
    if "--json" in line and result.stdout:
        json.loads(result.stdout)
    raise UsageError(f"{folder}: {told[-1][:1000]}")


COMMANDS = Reader("command line", 2000, _prepare, _make, _read)
