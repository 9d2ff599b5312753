"""docs/architectures.md: every architecture of the installed mlx-lm, and what was checked of it.

    python benchmarks/support_table.py --output docs/architectures.md

Each is made at a tiny random size (``tiny_configs.py``) in a process of its own, so that one that
crashes is a line of the table. ``--only`` names some; without ``--output`` the page is printed.
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

LIMIT = 1e-4
TIMEOUT_SECONDS = 120
_NO_ATTENTION = "it has no softmax attention"
REASONS = {
    "bitnet": "its layers are Metal kernels: no gradient, and none on a CPU",
    "deepseek_v41": "its keys are its values, many of them of groups of tokens: no row over tokens",
    "mamba": _NO_ATTENTION,
    "mamba2": _NO_ATTENTION,
    "muse_spark": "Metal kernels make its queries and keys: no gradient, and none on a CPU",
    "olmo": "it needs ai2-olmo, and then mlx-lm's code fails: it adds the mask 'causal' to scores",
    "prism_hadamard_qwen35": "packed checkpoints alone, on whose layers mlx-lm can put no LoRA",
    "rwkv7": _NO_ATTENTION,
}
PAGE = """\
# Architectures

Made by

    python benchmarks/support_table.py --output docs/architectures.md

from every module of mlx-lm {version}'s `models/`, each at a tiny random size:
{supported} of {total} are supported and passed every check. Not part of this table: transformers'
own attention, which `tests/test_transformers_rows.py` compares with for 32 of them, and
`tests/test_attention.py` and `tests/test_attention_rules.py` for Mistral and windows.

- **layers**: with softmax attention, of all. A layer without has no heads.
- **pattern**: largest difference between the recorded rows and float64 NumPy's softmax of the
  queries, keys, mask and sinks that the model hands to its attention function, prompts longer than
  the windows; NumPy's pattern times the values gives the model's own attention output to the error
  **output**. A dash where the model computes its pattern itself.
- **logits**: largest difference between the port's logits and the model's own, of all tokens and of
  a few.
- **trains**: how far three updates of LoRA on W_Q and W_K moved the rows; whatever else a fused
  projection makes stayed bit-identical. **4 bits**: the same on a quantized base.
- **stock**: largest logit difference after stock mlx-lm loaded the saved adapter.

| architecture | layers | pattern | output | logits | trains | 4 bits | stock |
|---|---|---|---|---|---|---|---|
{rows}

## Not supported

| architecture | why |
|---|---|
{failures}
"""


def check(name: str) -> dict[str, Any]:
    """All checks of one architecture, in this process."""
    import support_checks as checks

    from abft_mlx import ports

    model = tiny_configs.build(name)
    heads = ports.heads(model)
    found: dict[str, Any] = {"layers": [sum(one is not None for one in heads), len(heads)]}
    found["logits"] = checks.logit_error(model)
    if ports.port_for(model).computes_softmax:
        found["pattern"] = found["output"] = None
    else:
        found["pattern"], found["output"] = checks.pattern_error(model)
    found["trains"], found["kept"] = checks.train(model)
    with tempfile.TemporaryDirectory() as folder:
        found["stock"] = checks.reload_error(model, name, Path(folder))
    quantized = tiny_configs.build(name)
    checks.quantize(quantized)
    found["quantized"], found["quantized_kept"] = checks.train(quantized)
    return found


def problem(found: dict[str, Any]) -> str | None:
    """What of the checks failed, or None."""
    if "error" in found:
        return str(found["error"])
    small = ("pattern", "output", "logits", "stock")
    wrong = [f"{one} {found[one]:.1e}" for one in small if not (found[one] or 0) <= LIMIT]
    wrong += [f"{one} {found[one]:.1e}" for one in ("trains", "quantized") if not found[one] > 1e-4]
    wrong += [one for one in ("kept", "quantized_kept") if found[one] != 0]
    return ", ".join(wrong) or None


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


def page(found: dict[str, dict[str, Any]]) -> str:
    """The document of all results."""
    import mlx_lm

    good = {name: one for name, one in found.items() if problem(one) is None}
    rows = [
        f"| {name} | {one['layers'][0]} of {one['layers'][1]} | {_error(one['pattern'])} | "
        f"{_error(one['output'])} | {_error(one['logits'])} | {one['trains']:.2f} | "
        f"{one['quantized']:.2f} | {_error(one['stock'])} |"
        for name, one in good.items()
    ]
    failures = [
        f"| {name} | {_why(name, problem(one) or '')} |"
        for name, one in found.items()
        if name not in good
    ]
    return PAGE.format(
        version=mlx_lm.__version__,
        supported=len(good),
        total=len(found),
        rows="\n".join(rows),
        failures="\n".join(failures),
    )


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _why(name: str, text: str) -> str:
    """What went wrong, and where it is known, why."""
    seen = text.partition(";")[0].replace("|", "\\|").replace("\n", " ")
    return f"{REASONS[name]} ({seen})" if name in REASONS else seen


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
