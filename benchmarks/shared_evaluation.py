"""Seconds of an evaluation whose prompts share beginnings, against the same prompts computed whole.

    python benchmarks/shared_evaluation.py
    python benchmarks/shared_evaluation.py --draw per_query --queries 128

Label probabilities of a task's test prompts; interleaved, medians after a warm-up. Exit status 1 if
a label differs or a probability does by more than 1e-5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import mlx.core as mx
import numpy as np

from abft_mlx import experiment, recipe, runtime
from abft_mlx.evaluation import label_logits, label_probabilities
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.prompts import Prompt, batches

AGREE = 1e-5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", default="generated/urgency", help="recipe of the texts")
    parser.add_argument("--draw", choices=("fixed", "per_query"), default="fixed")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[4, 16], metavar="K")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each way")
    return parser.parse_args()


def measure(chosen: argparse.Namespace, k: int) -> bool:
    """Time both ways in turn, print a row, and say whether they agree."""
    changes = (
        f"prompt.demonstrations={k}",
        f"evaluation.demonstrations={chosen.draw}",
        f"evaluation.queries={chosen.queries}",
        f"model={chosen.model}",
    )
    opened = experiment.prepare(recipe.load(chosen.task, changes))
    model, space = opened.loaded.model, opened.task.space
    budget = opened.recipe.evaluation.batch_tokens
    prompts: list[Prompt] = opened.test_prompts()

    def whole() -> np.ndarray:
        found = np.zeros((len(prompts), len(space)))
        for batch in batches(prompts, max_tokens=budget):
            tokens, last = mx.array(batch.tokens), mx.array(batch.last)
            logits = label_logits(model, tokens, last, mx.array(space.first_ids))
            found[batch.rows] = softmax(np.array(logits))
        return found

    def shared() -> np.ndarray:
        return label_probabilities(model, prompts, space, batch_tokens=budget)

    expected, found = whole(), shared()
    seconds: dict[str, list[float]] = {"whole": [], "shared": []}
    for _ in range(chosen.repeats):
        for way in (whole, shared):
            start = time.perf_counter()
            way()
            seconds[way.__name__].append(time.perf_counter() - start)
    slow, fast = (statistics.median(taken) for taken in seconds.values())
    length = statistics.mean(len(one.token_ids) for one in prompts)
    print(f"| {k} | {length:.0f} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} × |", flush=True)
    same = (expected.argmax(axis=1) == found.argmax(axis=1)).all()
    return bool(same and np.abs(expected - found).max() <= AGREE)


def main() -> int:
    """Measure every k; exit status 1 if the ways disagree."""
    chosen = arguments()
    print(f"{runtime.device_description()}, {chosen.draw}\n")
    print("| k | tokens in a prompt | whole, seconds | shared, seconds | gain |")
    print("|---:|---:|---:|---:|---:|")
    agree = [measure(chosen, k) for k in chosen.demonstrations]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
