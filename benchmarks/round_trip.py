"""One adapter through every door: trained, exported three ways, pushed to a hub, measured again.

    python benchmarks/round_trip.py

``finetune`` on the bundled model, ``export`` to mlx-lm, PEFT and a merged model, the logits of all
of them on the same test prompts in the programs that they are for, ``push`` to a hub that listens
on this machine (``tests/loopback_hub.py``), and ``eval --adapter owner/name`` from there, beside
``eval --adapter RUN``. Prints a table; exit status 1 if logits differ by more than 1e-4 or the two
evaluations by anything. Needs what the tests need: torch, transformers and PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np

from abft_mlx import experiment, loading
from abft_mlx import recipe as recipes
from abft_mlx.exchange import answers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from loopback_hub import OWNER, LoopbackHub  # noqa: E402

NAME = "owner/demo-adapter"
LIMIT = 1e-4


def command(environment: dict[str, str], *arguments: object) -> dict[str, Any]:
    """The JSON document of one ``abft-mlx`` command, run in a process of its own."""
    given = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments), "--json"]
    print("$ abft-mlx", *given[2:-1], file=sys.stderr, flush=True)
    done = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit status {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def stock_logits(model: Any, prompts: list[list[int]]) -> np.ndarray:
    """(N, V) logits at the last token, by a model of mlx-lm's own."""
    return np.stack([np.array(model(mx.array([one]))[0, -1]) for one in prompts])


def peft_logits(base: Path, adapter: Path, prompts: list[list[int]]) -> np.ndarray:
    """(N, V) logits at the last token, by transformers and PEFT in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(whole, adapter).eval()
    with torch.no_grad():
        return np.stack([model(torch.tensor([one])).logits[0, -1].numpy() for one in prompts])


def main() -> int:
    """Go through all doors and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64, help="to compare logits on")
    chosen = parser.parse_args()
    hub = LoopbackHub()
    with tempfile.TemporaryDirectory() as folder, hub.serving():
        work = Path(folder)
        own = {"PYTHONPATH": str(ROOT), "HF_TOKEN": OWNER}
        environment = os.environ | hub.environment(work / "home") | own
        run = work / "run"
        command(environment, "finetune", "demo", "--output", run)
        exports = {to: work / to for to in ("mlx", "peft", "fused")}
        for to, output in exports.items():
            command(environment, "export", run, "--to", to, "--output", output)
        worst = compare(run, exports, chosen.prompts)
        command(environment, "push", run, NAME, "--with-peft")
        here = command(environment, "eval", "--adapter", run)
        back = command(environment, "eval", "--adapter", NAME)
    first, second = (one["methods"]["vanilla"] for one in (here, back))
    print(f"\nbase                        {here['base']['methods']['vanilla']['accuracy']:.4f}")
    print(f"eval --adapter RUN          {first['accuracy']:.4f}")
    print(f"eval --adapter {NAME} {second['accuracy']:.4f}  (n = {here['prompts']})")
    return 0 if worst <= LIMIT and first == second else 1


def compare(run: Path, exports: dict[str, Path], count: int) -> float:
    """Print how far the programs' logits are from ours; the largest difference."""
    opened = experiment.prepare(recipes.load(run), run)
    prompts = opened.test_prompts()[:count]
    tokens, labels = [list(one.token_ids) for one in prompts], list(opened.task.space.first_ids)
    ours = answers(
        opened.loaded.model, prompts, opened.task.space, opened.recipe.evaluation.batch_tokens
    ).vocabulary
    base = loading.find(opened.recipe.model)
    found: dict[str, Callable[[], np.ndarray]] = {
        "the base alone, for comparison": lambda: stock_logits(mlx_lm.load(str(base))[0], tokens),
        "run folder, stock mlx-lm": lambda: stock_logits(
            mlx_lm.load(str(base), adapter_path=str(run))[0], tokens
        ),
        "export --to mlx, stock mlx-lm": lambda: stock_logits(
            mlx_lm.load(str(base), adapter_path=str(exports["mlx"]))[0], tokens
        ),
        "export --to fused, stock mlx-lm": lambda: stock_logits(
            mlx_lm.load(str(exports["fused"]))[0], tokens
        ),
        "export --to peft, transformers": lambda: peft_logits(base, exports["peft"], tokens),
    }
    print("| against base + adapter, ours | largest difference of logits | same label |")
    print("|---|---:|---:|")
    differences = []
    for name, logits in found.items():
        theirs = logits()
        difference = float(np.abs(theirs - ours).max())
        same = int((theirs[:, labels].argmax(1) == ours[:, labels].argmax(1)).sum())
        print(f"| {name} | {difference:.1e} | {same} of {len(tokens)} |", flush=True)
        differences.append(difference)
    # The base is only there to be seen.
    return max(differences[1:])


if __name__ == "__main__":
    sys.exit(main())
