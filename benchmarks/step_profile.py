"""Where the exact step's time goes: every kind of operation in its graph, timed by itself.

    python benchmarks/step_profile.py

reads the graph of the bench's exact step, with what its backward pass computes again, runs each
operation on arrays of its shapes, and adds up by kind. Views cost nothing; arrays lie row by row,
so that copies of transposed factors are not in it. What the step takes beside the sum is that, and
MLX's own work. On a GPU elementwise operations are fused, and this says little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

REPEATS = 5


def operations() -> dict[str, Callable[..., Any]]:
    """How to run an operation again, by MLX's name of it."""
    import mlx.core as mx
    import mlx.nn as nn

    from abft_mlx import activations

    def last(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *_: function(x, axis=-1)

    def joined(*arrays: Any) -> Any:
        lengths = zip(*(one.shape for one in arrays), strict=True)
        differing = [axis for axis, found in enumerate(lengths) if len(set(found)) > 1]
        return mx.concatenate(arrays, axis=differing[0] if differing else -1)

    return {
        "Matmul": mx.matmul,
        "Add": mx.add,
        "Multiply": mx.multiply,
        "Subtract": mx.subtract,
        "Divide": mx.divide,
        "Negative": mx.negative,
        "Square": mx.square,
        "Sqrt": mx.sqrt,
        # With the product that makes it SiLU: the step computes it as this processor does best.
        "Sigmoid": activations.quick(nn.silu),
        "Exp": mx.exp,
        "Softmax": last(mx.softmax),
        "Reduce": last(mx.sum),
        "Select": lambda a, b, c: mx.where(a > 0, b, c),
        "Concatenate": joined,
    }


def profile(size: Any) -> tuple[Counter[str], Counter[str], list[str]]:
    """Seconds and counts by kind of operation, and the kinds that were not run.

    Args:
        size: of the bench.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from abft_mlx.bench.contenders import batch_of, our_step
    from abft_mlx.bench.models import PUNISH
    from abft_mlx.footprint.graph import trace
    from abft_mlx.footprint.recomputed import marked, spelled_out

    step, batch = our_step(size, mx.float32), batch_of(size).arrays()
    step.seams.again = marked
    kept = step.model.trainable_parameters()
    names = [name for name, _ in tree_flatten(kept)]

    def function(*arrays: mx.array) -> Sequence[mx.array]:
        parameters = tree_unflatten(list(zip(names, arrays, strict=True)))
        terms, gradients = step.value_and_grad(parameters, batch, mx.array(PUNISH))
        return [terms, *(one for _, one in tree_flatten(gradients))]

    graph = spelled_out(trace(function, [one for _, one in tree_flatten(kept)]))
    shapes = {one.name: one.shape for one in graph.given}
    seen: Counter[tuple[str, tuple[tuple[int, ...], ...]]] = Counter()
    for one in graph.operations:
        shapes |= {value.name: value.shape for value in one.outputs}
        seen[one.name, tuple(shapes[name] for name in one.inputs)] += 1
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    again = operations()
    for (name, inputs), times in seen.items():
        counts[name] += times
        if name in again:
            seconds[name] += times * _seconds(again[name], inputs)
    return seconds, counts, sorted(set(counts) - set(again))


def _seconds(function: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> float:
    import mlx.core as mx

    arrays = [mx.random.normal(shape) for shape in shapes]
    mx.eval(arrays)
    mx.eval(function(*arrays))
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval(function(*arrays))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Print the table."""
    from abft_mlx.errors import UsageError

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="12x768x32000:8x160k4", help="as of abft-mlx bench")
    arguments = parser.parse_args()
    from abft_mlx.bench import contenders, limit, sizes

    try:
        size = sizes.parse(arguments.size)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    import mlx.core as mx

    seconds, counts, others = profile(size)
    update, rate = contenders.ours(size, mx.float32, "exact"), limit.product_rate(mx.float32)
    update()
    whole, at_best = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        update()
        whole.append(time.perf_counter() - start)
        at_best.append(limit.step_flops(size) / rate())
    step = statistics.median(whole)
    print("| operation | how many | seconds | of the step |\n|---|---:|---:|---:|")
    for name, spent in seconds.most_common():
        print(f"| {name} | {counts[name]} | {spent:.3f} | {spent / step:.1%} |")
    total = sum(seconds.values())
    print(
        f"| all of these | {sum(counts[n] for n in seconds)} | {total:.3f} | {total / step:.1%} |"
    )
    print(f"| the step | {sum(counts.values())} | {step:.3f} | 100% |")
    best = statistics.median(at_best)
    print(f"| its products at the rate of a large one | | {best:.3f} | {best / step:.1%} |")
    print(f"\nNot run: {', '.join(others)}.")


if __name__ == "__main__":
    main()
