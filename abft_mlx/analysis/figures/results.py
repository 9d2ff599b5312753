"""Figures of training and of answers: curves, bars, grids, confusion matrices, reliability.

Each function draws on a matplotlib Axes, which it returns, or on an empty Figure, and returns its
Axes. Letters: M methods, J tasks, U updates, C classes, S states. Rates are in 0..1, NaN for none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style

__all__ = ["accuracy", "confusion", "confusions", "consistency", "data_efficiency",
           "extrapolation", "grid", "head_count", "interpolation", "plane", "reliability",
           "time_to_accuracy", "training_curves", "unseen"]  # fmt: skip
# Panels of the training curves from the top: label, and what the values are multiplied by.
QUANTITIES: dict[str, tuple[str, float]] = {
    "loss": ("loss", 1.0),
    "punish": ("punish term\n(attention)", 1.0),
    "reward": ("reward term\n(attention)", 1.0),
    "induction_heads": ("induction heads\nin a prompt", 1.0),
    "A": ("punish\nweight A", 1.0),
    "validation_accuracy": ("validation\naccuracy (%)", 100.0),
}
NUMBERED_CLASSES = 14

Curves = Mapping[str, np.ndarray]


def quantities(curves: Sequence[Curves]) -> list[str]:
    """Those for which some run has a number: one panel each."""
    return [
        name
        for name in QUANTITIES
        if any(name in run and not np.isnan(run[name]).all() for run in curves)
    ]


def training_curves(
    figure: Any,
    seen: Sequence[np.ndarray],
    curves: Sequence[Curves],
    names: Sequence[str],
    spread: Sequence[Curves] | None = None,
) -> list[Any]:
    """Loss, its terms, heads, A and validation over the prompts seen (the paper's figure 5).

    A panel for each quantity, a line in it for each run: ``seen`` has (U,) training prompts after
    each update, ``curves`` (U,) arrays by the names of ``QUANTITIES``, NaN where not measured, and
    ``spread`` half the height of a band around each.
    """
    shown = quantities(curves)
    panels = figure.subplots(max(1, len(shown)), sharex=True, squeeze=False)[:, 0]
    for panel, quantity in zip(panels, shown, strict=False):
        label, factor = QUANTITIES[quantity]
        for index, run in enumerate(curves):
            if quantity not in run:
                continue
            known = ~np.isnan(run[quantity])
            around = (spread[index] if spread else {}).get(quantity)
            style.line(
                panel, index, seen[index][known], factor * run[quantity][known], names[index],
                spread=None if around is None else factor * around[known],
                markers=quantity == "validation_accuracy" or known.sum() == 1,
            )  # fmt: skip
        panel.set_ylabel(label, fontsize=style.SMALL_POINTS)
    panels[-1].set_xlabel("training prompts seen")
    if len(curves) > 1:
        style.legend(panels[0])
    return list(panels)


def time_to_accuracy(
    axes: Any,
    seconds: Sequence[np.ndarray],
    accuracy: Sequence[np.ndarray],
    names: Sequence[str],
    untrained: float | None = None,
) -> Any:
    """Accuracy against the seconds in updates, over a logarithmic axis.

    For each run ``seconds`` and ``accuracy`` are (P,); ``untrained`` is a level.
    """
    from matplotlib.ticker import LogLocator

    for index, (name, x, y) in enumerate(zip(names, seconds, accuracy, strict=True)):
        style.line(axes, index, x, 100 * y, name)
    _level(axes, untrained, "untrained")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    return _finished(axes, "seconds in updates", "accuracy (%)")


def head_count(
    axes: Any,
    seen: Sequence[np.ndarray],
    heads: Sequence[np.ndarray],
    spread: Sequence[np.ndarray],
    methods: Sequence[str],
) -> Any:
    """Induction heads while training (the paper's figure 5).

    For each method (U,) prompts seen, mean heads in a prompt, and deviations over runs.
    """
    for index, method in enumerate(methods):
        style.line(
            axes, index, seen[index], heads[index], method, spread=spread[index], markers=False
        )
    axes.set_ylim(bottom=0)
    return _finished(axes, "training prompts seen", "induction heads in a prompt")


def data_efficiency(
    axes: Any,
    examples: np.ndarray,
    accuracy: np.ndarray,
    ends: np.ndarray,
    methods: Sequence[str],
    untrained: float | None,
) -> Any:
    """Accuracy against the number of training examples (the paper's figure 2).

    ``examples`` is (E,), ``accuracy`` (M, E), ``ends`` (2, M, E) of the intervals; ``untrained`` a
    level.
    """
    for index, method in enumerate(methods):
        style.line(
            axes, index, examples, 100 * accuracy[index], method, spread=100 * ends[:, index]
        )
    _level(axes, untrained, "vanilla")
    axes.set_xscale("log", base=2)
    axes.set_xticks(examples, [f"{size:g}" for size in examples])
    return _finished(axes, "training examples", "accuracy (%)")


def accuracy(
    axes: Any,
    accuracy: np.ndarray,
    spread: np.ndarray,
    paper: np.ndarray,
    methods: Sequence[str],
    tasks: Sequence[str],
    label: str = "accuracy (%)",
) -> Any:
    """Grouped bars of methods on tasks; a black line across a bar is the paper's number.

    ``accuracy``, its ``spread`` over seeds and ``paper`` are (M, J).
    """
    width = 0.8 / len(methods)
    places = np.arange(len(tasks), dtype=np.float64)
    for index, method in enumerate(methods):
        left = places + (index - (len(methods) - 1) / 2) * width
        axes.bar(
            left, 100 * accuracy[index], width, yerr=100 * np.nan_to_num(spread[index]),
            label=style.name(method), color=style.colour(index), edgecolor="white",
            hatch=style.cycled(style.HATCHES, index),
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )  # fmt: skip
        known = ~np.isnan(paper[index])
        if known.any():
            named = "the paper" in axes.get_legend_handles_labels()[1]
            axes.hlines(
                100 * paper[index][known], (left - width / 2)[known], (left + width / 2)[known],
                colors="black", linewidth=1.6, label=None if named else "the paper",
            )  # fmt: skip
    shown = [style.plain(task, 24) for task in tasks]
    slanted = max(map(len, shown)) * 0.07 > style.cell_inches(axes, len(tasks))
    axes.set_xticks(places, shown)
    if slanted:
        axes.tick_params("x", labelrotation=25)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    axes.set_ylim(0, 100)
    return _finished(axes, "", label)


def consistency(
    axes: Any, values: np.ndarray, spread: np.ndarray, paper: np.ndarray, methods: Sequence[str]
) -> Any:
    """Consistency before and after fine-tuning (the paper's table 3).

    ``values``, ``spread`` and ``paper`` are (M, 2): over templates and over demonstrations.
    """
    kinds = ("over templates", "over demonstrations")
    return accuracy(axes, values, spread, paper, methods, kinds, "consistency of answers (%)")


def unseen(
    axes: Any,
    values: np.ndarray,
    spread: np.ndarray,
    paper: np.ndarray,
    zero_shot: np.ndarray,
    methods: Sequence[str],
) -> Any:
    """Accuracy where no demonstration carries the gold label (the paper's figure 3).

    ``values``, ``spread`` and ``paper`` are (M, 2): with random demonstrations, and with the gold
    label unseen; ``zero_shot`` (M,) is a level for each method.
    """
    for index, method in enumerate(methods):
        if not np.isnan(zero_shot[index]):
            axes.axhline(
                100 * zero_shot[index], color=style.colour(index), linestyle="--", linewidth=1,
                label=f"{style.name(method)}, zero-shot",
            )  # fmt: skip
    return accuracy(axes, values, spread, paper, methods, ("random", "gold label unseen"))


def grid(
    axes: Any,
    accuracy: np.ndarray,
    punish: np.ndarray,
    reward: np.ndarray,
    limits: tuple[float, float],
    title: str,
) -> Any:
    """Accuracy (A, B) over punish weights (A,) and reward weights (B,) (the paper's figure 6).

    ``limits`` are those of the colours, the same for grids to be compared.
    """
    low, high = (100 * end for end in limits)
    image = axes.imshow(
        100 * accuracy, origin="lower", aspect="auto", cmap=style.COLOUR_MAP, vmin=low,
        vmax=max(high, low + 1e-9),
    )  # fmt: skip
    for row, column in np.argwhere(~np.isnan(accuracy)):
        value = 100 * accuracy[row, column]
        _number(axes, image, row, column, value, f"{value:.1f}")
    axes.set_xticks(np.arange(len(reward)), [f"{value:g}" for value in reward])
    axes.set_yticks(np.arange(len(punish)), [f"{value:g}" for value in punish])
    axes.set_title(style.plain(title, 40))
    style.colour_bar(axes, image, "accuracy (%)")
    return _finished(axes, "reward weight B", "punish weight A at the start")


def plane(
    axes: Any,
    accuracy: np.ndarray,
    factors: np.ndarray,
    names: tuple[str, str],
    paper: Mapping[str, float] | None = None,
) -> Any:
    """Accuracy on the plane of a base and two fine-tunings of it (the paper's figures 7 and 9).

    ``accuracy`` is (F, F), the first method's factor (the horizontal axis) by the second's; both
    have the ``factors`` (F,). ``paper`` has ``base``, ``first``, ``second`` and ``best``.
    """
    values = 100 * accuracy.T
    levels = np.linspace(values.min(), max(values.max(), values.min() + 1e-6), 12)
    filled = axes.contourf(factors, factors, values, levels=levels, cmap=style.COLOUR_MAP)
    best = np.unravel_index(int(np.argmax(accuracy)), accuracy.shape)
    for key, name, x, y, mark in (
        ("base", "base", 0.0, 0.0, "o"),
        ("first", names[0], 1.0, 0.0, "s"),
        ("second", names[1], 0.0, 1.0, "^"),
        ("best", "best", factors[best[0]], factors[best[1]], "*"),
    ):
        row, column = (np.flatnonzero(np.isclose(factors, at)) for at in (x, y))
        label = style.name(name)
        if len(row) and len(column):
            theirs = f"; paper {100 * paper[key]:.0f}" if paper and key in paper else ""
            label += f" ({100 * accuracy[row[0], column[0]]:.1f}{theirs})"
        axes.plot([x], [y], mark, color="white", markeredgecolor="black", markersize=8, label=label)
    axes.plot([1, 0], [0, 1], color="white", linestyle="--", linewidth=1)
    style.colour_bar(axes, filled, "accuracy (%)")
    first, second = (f"factor of {style.plain(name, 24)}" for name in names)
    return _finished(axes, first, second)


def interpolation(
    axes: Any,
    share: np.ndarray,
    accuracy: np.ndarray,
    names: tuple[str, str],
    base: float | None = None,
) -> Any:
    """Accuracy on the straight line between two fine-tunings of a base (the paper's figure 7).

    ``share`` (P,) is of the second one; ``accuracy`` (R, P) has a row for each run, whose standard
    deviation is a band; ``base`` is a level.
    """
    first, second = (style.plain(name, 24) for name in names)
    middle, around = mean_and_deviation(100 * accuracy)
    style.line(axes, 0, share, middle, "between the two", spread=around)
    _level(axes, base, "base")
    for index, (place, mark, name) in enumerate(((0.0, "s", first), (1.0, "^", second)), 1):
        there = np.isclose(share, place)
        axes.plot(
            share[there], middle[there], mark, color=style.colour(index), markersize=7,
            label=style.name(name), linestyle="none",
        )  # fmt: skip
    return _finished(axes, f"share of {second}, the rest {first}", "accuracy (%)")


def extrapolation(
    axes: Any, factors: np.ndarray, validation: np.ndarray, test: np.ndarray, chosen: np.ndarray
) -> Any:
    """Accuracy over the factor of an adapter, which the paper left open beyond 1.

    ``factors`` is (F,), ``validation`` and ``test`` are (R, F), a row for each run, with bands of
    one standard deviation; ``chosen`` (R,) is what each run's validation prompts chose.
    """
    for index, (name, values) in enumerate((("validation", validation), ("test", test))):
        middle, around = mean_and_deviation(100 * values)
        style.line(axes, index, factors, middle, name, spread=around)
    axes.axvline(1, color="black", linewidth=1, linestyle=":", label="as trained")
    axes.plot(
        chosen, np.full(len(chosen), 0.02), style.MARKERS[2], color=style.colour(2), clip_on=False,
        transform=axes.get_xaxis_transform(), label="chosen on validation",
    )  # fmt: skip
    return _finished(axes, "factor of the adapter", "accuracy (%)")


def confusion(axes: Any, counts: np.ndarray, names: Sequence[str], *, bar: bool = True) -> Any:
    """Which classes are taken for which: gold classes downwards, answers to the right.

    ``counts`` (C, C) stand in the cells of up to 14 classes; of more classes every n-th is named.
    Colours are shares of the gold class.
    """
    of_class = counts.sum(axis=1, keepdims=True)
    share = 100.0 * counts / np.maximum(1, of_class)
    image = axes.imshow(
        share, cmap=style.COLOUR_MAP, vmin=0, vmax=100, interpolation="none", aspect="auto"
    )
    room = style.cell_inches(axes, len(names))
    if len(names) <= NUMBERED_CLASSES and room > 0.07 * len(f"{int(counts.max()):,}"):
        for row, column in np.ndindex(counts.shape):
            _number(axes, image, row, column, share[row, column], f"{int(counts[row, column]):,}")
    every = max(1, round(0.13 / min(room, style.cell_inches(axes, len(names), vertical=True))))
    shown = {place: style.plain(names[place], 16) for place in range(0, len(names), every)}
    flat = room > 0.07 * max(map(len, shown.values()))
    axes.set_xticks([*shown], [*shown.values()], rotation=0 if flat else 90)
    axes.set_yticks([*shown], [*shown.values()])
    axes.set_xlabel("answer")
    axes.set_ylabel("gold label")
    if bar:
        style.colour_bar(axes, image, "share of the gold label (%)")
    return axes


def confusions(
    figure: Any, counts: Sequence[np.ndarray], names: Sequence[str], state_names: Sequence[str]
) -> list[Any]:
    """A confusion matrix for each state: side by side, or one above the other in a column."""
    wide = figure.get_figwidth() > style.WIDTHS["column"] + 1
    shape = (1, len(counts)) if wide else (len(counts), 1)
    panels = figure.subplots(*shape, squeeze=False).ravel()
    for panel, table, name in zip(panels, counts, state_names, strict=True):
        confusion(panel, table, names, bar=not wide or panel is panels[-1])
        panel.set_title(style.plain(name, 28))
        panel.label_outer()
    return list(panels)


def reliability(
    figure: Any,
    confidence: np.ndarray,
    accuracy: np.ndarray,
    count: np.ndarray,
    names: Sequence[str],
) -> list[Any]:
    """How often answers are right at each confidence, and how many prompts are there.

    ``confidence`` and ``accuracy`` are (S, bins), NaN for an empty bin, ``count`` (S, bins).
    """
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":", label="calibrated")
    bin_width = 100 / count.shape[1]
    width = 0.9 * bin_width / len(names)
    for index, name in enumerate(names):
        known = count[index] > 0
        style.line(upper, index, 100 * confidence[index][known], 100 * accuracy[index][known], name)
        left = bin_width * (np.arange(count.shape[1]) + 0.05) + width * (index + 0.5)
        lower.bar(
            left, count[index], width, color=style.colour(index), edgecolor="white",
            hatch=style.cycled(style.HATCHES, index), label=style.name(name),
        )  # fmt: skip
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy (%)")
    lower.set(xlabel="confidence of the answer (%)", ylabel="prompts")
    lower.yaxis.get_major_locator().set_params(integer=True, nbins=3)
    style.legend(upper)
    return [upper, lower]


def mean_and_deviation(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis; 0 for one run."""
    middle = runs.mean(axis=0)
    return middle, runs.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(middle)


def _number(axes: Any, image: Any, row: int, column: int, value: float, text: str) -> None:
    """A number in a cell of an image."""
    axes.text(
        column, row, text, ha="center", va="center", fontsize=style.SMALL_POINTS,
        color=style.over(image, value),
    )  # fmt: skip


def _level(axes: Any, rate: float | None, label: str) -> None:
    """A horizontal line at a rate, where there is one."""
    if rate is not None:
        axes.axhline(100 * rate, color="black", linewidth=1, linestyle=":", label=label)


def _finished(axes: Any, x: str, y: str) -> Any:
    """Axis labels and legend of a figure of one Axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    style.legend(axes)
    return axes
