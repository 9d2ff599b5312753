"""The rules by which a claim of the paper holds, does not hold, or cannot be told, from intervals.

All numbers are rates in 0..1; a point is 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from abft_mlx.analysis.measurements import Measurement, of_task, tasks
from abft_mlx.analysis.special import Plane
from abft_mlx.analysis.statistics import SAMPLES, SEED, Estimate, bootstrap

HOLDS = "holds"
FAILS = "does not hold"
UNTOLD = "cannot be tested at this scale"

POINT = 0.01
BARRIER = 0.02
EARLY = 1 / 3
FEWEST_LAYERS = 6
FEWEST_SEEDS = 2

MORE = (
    "Holds if the interval of the difference lies above 0; does not hold if it lies below 1 point, "
    "so that any gain is smaller than that; otherwise the interval is too wide to tell."
)
NO_LESS = (
    "Holds if the interval of the difference lies above −1 point; does not hold if it lies below "
    "0; otherwise the interval is too wide to tell."
)


def more(difference: Estimate) -> str:
    """Verdict on a rise; see :data:`MORE`."""
    if difference.low > 0:
        return HOLDS
    return FAILS if difference.high < POINT else UNTOLD


def no_less(difference: Estimate) -> str:
    """Verdict on being at least as good; see :data:`NO_LESS`."""
    if difference.low > -POINT:
        return HOLDS
    return FAILS if difference.high < 0 else UNTOLD


def opposite(difference: Estimate) -> Estimate:
    """The difference taken the other way round."""
    return Estimate(-difference.mean, -difference.high, -difference.low)


def drift(heads: Sequence[float]) -> float:
    """How far the number of heads moved in training, as a share of where it began.

    Both ends are means, of the first three updates (the controller acts after them) and of the
    last quarter.
    """
    start = float(np.mean(heads[:3]))
    end = float(np.mean(heads[-max(1, len(heads) // 4) :]))
    return abs(end - start) / start if start else 0.0


@dataclass(frozen=True)
class Sensitivity:
    """How much accuracy depends on the weights A and B.

    Attributes:
        without: standard deviation over the grid without the controller.
        held: with it.
        difference: without less with, and its interval.
        points: pairs of weights in the grid.
        tasks: their names.
    """

    without: float
    held: float
    difference: Estimate
    points: int
    tasks: tuple[str, ...]


def sensitivity(without: Sequence[Measurement], held: Sequence[Measurement]) -> Sensitivity | None:
    """Standard deviation of accuracy over a grid of weights, mean over tasks.

    Grid points and seeds are those that both methods have; seeds and queries are drawn again as in
    :func:`abft_mlx.analysis.statistics.bootstrap`, the same ones for both. None where a grid has
    fewer than four points.
    """
    random = np.random.default_rng(SEED)
    total, plain, points = np.zeros(SAMPLES), np.zeros(2), 0
    counted: list[str] = []
    for task in tasks(without):
        grids = [_grid(of_task(side, task)) for side in (without, held)]
        keys = sorted(set(grids[0]) & set(grids[1]))
        seeds = sorted({seed for _, seed in keys})
        settings = sorted({point for point, _ in keys})
        if len(settings) < 4 or len(keys) != len(seeds) * len(settings):
            continue
        # (side, points, seeds, queries)
        shares = np.array([[[grid[p, s] for s in seeds] for p in settings] for grid in grids])
        queries = shares.shape[-1]
        drawn = random.multinomial(queries, np.full(queries, 1 / queries), SAMPLES) / queries
        chosen = random.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), SAMPLES)
        again = np.einsum("npsq,bq,bs->nbp", shares, drawn, chosen / len(seeds), optimize=True)
        spread = again.std(axis=2)
        total += spread[0] - spread[1]
        plain += shares.mean(axis=(2, 3)).std(axis=1)
        points = len(settings)
        counted.append(task)
    if not counted:
        return None
    first, second = plain / len(counted)
    low, high = np.quantile(total / len(counted), [0.025, 0.975])
    difference = Estimate(first - second, float(low), float(high))
    return Sensitivity(float(first), float(second), difference, points, tuple(counted))


def _grid(found: Sequence[Measurement]) -> dict[tuple[str, int], np.ndarray]:
    return {
        (repr(one.swept), -1 if one.seed is None else one.seed): one.shares
        for one in found
        if one.right
    }


def barrier(planes: Sequence[Plane]) -> tuple[Estimate, float] | None:
    """The highest loss of accuracy on the way from one method's weights to the other's.

    On the segment between the two corners of the plane, how far accuracy lies below the straight
    line between its ends; the point where the mean over tasks and seeds is worst, with the interval
    of that point from :func:`abft_mlx.analysis.statistics.bootstrap` (query by query: the same
    queries stand behind all three points).

    Returns:
        The barrier, and how much of the second method that point has; None where the grid has no
        point inside the segment, or a plane does not say which prompts were answered rightly.
    """
    names = list(dict.fromkeys(one.task for one in planes))
    worst: tuple[Estimate, float] | None = None
    for t in (float(one) for one in planes[0].factors if 0 < one < 1):
        depths = [[_depth(one, t) for one in planes if one.task == name] for name in names]
        if any(one is None for several in depths for one in several):
            continue
        here = bootstrap([np.array(several) for several in depths])
        if worst is None or here.mean > worst[0].mean:
            worst = here, t
    return worst


def _depth(plane: Plane, t: float) -> np.ndarray | None:
    """(Q,) how far each query's share of right answers lies below the line between the ends."""
    first, second, middle = plane.shares(1, 0), plane.shares(0, 1), plane.shares(1 - t, t)
    if first is None or second is None or middle is None:
        return None
    return (1 - t) * first + t * second - middle


def one_basin(depth: Estimate) -> str:
    """Verdict on a barrier: none of two points or more, or surely one."""
    if depth.high < BARRIER:
        return HOLDS
    return FAILS if depth.low > 0 else UNTOLD


def peak_depth(shift: dict[str, list[float]]) -> float:
    """Where the largest change lies: 0 for the first layer, 1 for the last."""
    norms = np.array(shift["q"]) + np.array(shift["k"])
    return float(np.argmax(norms)) / max(1, len(norms) - 1)


def middle_to_late(depth: Estimate, layers: int) -> str:
    """Verdict on the layer of the largest change."""
    if layers < FEWEST_LAYERS:
        return UNTOLD
    if depth.low > EARLY:
        return HOLDS
    return FAILS if depth.high < EARLY else UNTOLD
