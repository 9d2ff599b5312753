"""Do stock mlx-lm and abft-mlx give the same logits with an adapter? Exit status 1 if not.

    python benchmarks/compare_with_mlx_lm.py runs/demo --prompts 64

The adapter's folder must be a run folder, whose recipe names the model and the prompts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm

from abft_mlx import evaluation, experiment, loading, recipe

TOLERANCE = 1e-4


def main() -> int:
    """Compare, print the largest differences, say whether they are small enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    chosen = parser.parse_args()
    opened = experiment.prepare(recipe.load(str(chosen.run / "recipe.yaml")), chosen.run)
    folder = str(loading.find(opened.recipe.model, opened.recipe.revision))
    stock, _ = mlx_lm.load(folder, adapter_path=str(chosen.run))
    base, _ = mlx_lm.load(folder)
    labels = mx.array(opened.space.first_ids)
    whole = few = moved = 0.0
    for prompt in opened.test_prompts()[: chosen.prompts]:
        tokens = mx.array([prompt.token_ids])
        theirs = stock(tokens)[0, -1]
        ours = opened.loaded.model(tokens)[0, -1]
        ours_few = evaluation.label_logits(
            opened.loaded.model, tokens, mx.array([prompt.last]), labels
        )[0]
        whole = max(whole, mx.abs(ours - theirs).max().item())
        few = max(few, mx.abs(ours_few - theirs[labels]).max().item())
        moved = max(moved, mx.abs(base(tokens)[0, -1] - theirs).max().item())
    print(f"{chosen.prompts} prompts; largest differences of logits:")
    print(f"  ours with adapter, stock mlx-lm with adapter          {whole:.2e}")
    print(f"  our label logits, stock mlx-lm with adapter           {few:.2e}")
    print(f"  stock mlx-lm without adapter, stock mlx-lm with it    {moved:.2e}")
    same = max(whole, few) <= TOLERANCE < moved
    print("the same" if same else f"NOT the same within {TOLERANCE}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
