"""docs/architectures.md: every architecture of the installed mlx-lm, and what was checked of it.

    python benchmarks/support_table.py --output docs/architectures.md

Each is made at a tiny random size (``tiny_configs.py``) in a process of its own, so that one that
crashes is a line of the table. ``--only`` names some; without ``--output`` the page is printed.
Needs the extra ``bench``, for transformers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tiny_configs
from support_page import page

TIMEOUT_SECONDS = 120


def check(name: str) -> dict[str, Any]:
    """All checks of one architecture, in this process."""
    import support_checks as checks
    import transformers_oracle as oracle

    from abft_mlx import ports

    model = tiny_configs.build(name)
    heads = ports.heads(model)
    found: dict[str, Any] = {
        "layers": [sum(one is not None for one in heads), len(heads)],
        "trained": checks.trained(model),
        "logits": checks.logit_error(model),
        "hooks": checks.hook_error(model),
        "padding": checks.padding_error(model),
        "pattern": None,
        "output": None,
    }
    if ports.port_for(model).calls:
        found["pattern"], found["output"] = checks.pattern_error(model)
    found["lora"], found["kept"] = checks.train(model)
    with tempfile.TemporaryDirectory() as folder:
        found["stock"] = checks.reload_error(model, name, Path(folder))
    quantized = tiny_configs.build(name)
    checks.quantize(quantized)
    found["quantized"], found["quantized_kept"] = checks.train(quantized)
    found["why_not"], found["note"] = oracle.why_not(name), oracle.note(name)
    compared = {} if found["why_not"] else oracle.compare(name)
    found["eager"], found["eager_logits"] = compared.get("pattern"), compared.get("logits")
    found["largest"] = compared.get("largest")
    return found


def apart(name: str) -> dict[str, Any]:
    """The checks of one architecture in a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {TIMEOUT_SECONDS} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"the process crashed ({done.returncode}): {last}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file to write")
    parser.add_argument("--only", nargs="*", help="architectures to check")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        try:
            print(json.dumps(check(chosen.one)))
        except (Exception, SystemExit) as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return
    every = tiny_configs.architectures()
    names = chosen.only or every
    unknown = [one for one in names if one not in every]
    if unknown:
        parser.error(
            f"the installed mlx-lm has no {', '.join(unknown)}; name modules of its models"
        )
    with ThreadPoolExecutor(chosen.jobs) as pool:
        found = dict(zip(names, pool.map(apart, names), strict=True))
    text = page(found)
    if chosen.output is None:
        print(text)
    else:
        chosen.output.write_text(text, encoding="utf-8")
        print(f"wrote {chosen.output}")


if __name__ == "__main__":
    main()
