"""The figures of runs and studies: functions from arrays to matplotlib.

Each draws on a matplotlib Axes, or on an empty Figure where it has several panels. Letters: L
layers, H heads, R rows of heads, T tokens, K demonstrations, M methods, U updates, C classes, S
states. Rates are in 0..1, NaN for none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis import style

__all__ = ["attention_map", "attention_maps", "bars", "confusion", "confusions", "detectors",
           "extrapolation", "grid", "head_map", "head_maps", "label_attention", "lines", "plane",
           "reliability", "shift", "training_curves"]  # fmt: skip
QUERY_TOKENS = 6
NUMBERED_CELLS, NUMBERED_CLASSES = 96, 14
# Panels of the training curves from the top: label, and what the values are multiplied by.
QUANTITIES: dict[str, tuple[str, float]] = {
    "loss": ("loss", 1.0),
    "punish": ("punish term\n(attention)", 1.0),
    "reward": ("reward term\n(attention)", 1.0),
    "induction_heads": ("induction heads\nin a prompt", 1.0),
    "A": ("punish\nweight A", 1.0),
    "validation_accuracy": ("validation\naccuracy (%)", 100.0),
}

Curves = Mapping[str, np.ndarray]
# Name, x (X,), y (X,), and half the height of a band (X,), its ends (2, X), or None.
Series = tuple[str, Any, np.ndarray, np.ndarray | None]


def attention_map(
    axes: Any,
    rows: np.ndarray,
    tokens: Sequence[str],
    label_positions: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
    *,
    last: bool = True,
) -> None:
    """What heads look at from the last position, token by token (the paper's figures 8 and 16).

    The colour is the square root of the attention, so that little is seen too. Where not all
    tokens have room, the labels, the last tokens and some between are named.

    Args:
        axes: a matplotlib Axes.
        rows: (R, T) attention of the last position, NaN for a head that is not there.
        tokens: T texts.
        label_positions: (K,) of the demonstrations' label tokens.
        right: (K,) bool, the label equals the gold one.
        names: of the R heads.
        last: name the tokens: of maps above one another the last one does.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.transforms import offset_copy

    image = axes.imshow(
        np.ma.masked_invalid(rows), aspect="auto", interpolation="none", cmap=style.COLOUR_MAP,
        norm=PowerNorm(0.5, vmin=0, vmax=1),
    )  # fmt: skip
    above = offset_copy(axes.get_xaxis_transform(), axes.figure, y=4, units="points")
    right = np.asarray(right, dtype=bool)
    for index, (chosen, mark, label) in enumerate(
        ((right, "v", "label equal to the gold one"), (~right, "x", "other label"))
    ):
        where = np.asarray(label_positions)[chosen]
        (marks,) = axes.plot(
            where, np.full(len(where), 1.0), mark, color=style.colour(index), clip_on=False,
            transform=above, label=label, linestyle="none",
        )  # fmt: skip
        marks.set_in_layout(False)  # without points its place would be the figure's corner
    axes.set_xlim(-0.5, len(tokens) - 0.5)
    places: list[int] = []
    if last:
        end = len(tokens) - 1
        query = range(end, max(end - QUERY_TOKENS, -1), -1)
        places = _spaced(axes, len(tokens), [end, *map(int, label_positions), 0, *query])
        axes.set_xlabel("token of the prompt")
    axes.set_xticks(places, [_token(tokens[place]) for place in places], rotation=90)
    heads = _spaced(axes, len(names), vertical=True)
    axes.set_yticks(heads, [style.plain(names[head], 20) for head in heads])
    axes.tick_params(length=2)
    style.colour_bar(axes, image, "attention (share)").set_ticks([0, 0.1, 0.5, 1])
    if axes.get_subplotspec().is_first_row():
        style.legend(axes)


def attention_maps(
    figure: Any,
    states: Mapping[str, np.ndarray],
    tokens: Sequence[str],
    label_positions: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
) -> None:
    """Several states of a model over one prompt, one above the other.

    ``states`` has (R, T) attention by the state's name, the same heads in all; the rest is as of
    :func:`attention_map`.
    """
    panels = figure.subplots(len(states), squeeze=False)[:, 0]
    for panel, (name, rows) in zip(panels, states.items(), strict=True):
        attention_map(panel, rows, tokens, label_positions, right, names, last=panel is panels[-1])
        panel.set_ylabel(style.plain(name, 20))


def head_map(
    axes: Any,
    values: np.ndarray,
    label: str,
    *,
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
    least: float = 1e-9,
    bar: bool = True,
) -> None:
    """A coloured cell for every head, the first layer at the bottom; numbers where they fit.

    Args:
        axes: a matplotlib Axes.
        values: (L, H), NaN where there is no head, which is hatched.
        label: of the colour bar: what the values are, with their unit.
        limits: lowest and highest value of the colours; by default those of the values.
        diverging: colours of two sides around 0, for differences.
        least: what the colours span at the least, so that noise looks like it.
        bar: draw the colour bar.
    """
    low, high = limits or _limits([values], diverging=diverging, least=least)
    image = axes.imshow(
        np.ma.masked_invalid(values), origin="lower", aspect="auto", interpolation="none",
        cmap=style.DIVERGING_MAP if diverging else style.COLOUR_MAP, vmin=low, vmax=high,
    )  # fmt: skip
    # A cell without a head is transparent and shows what lies behind it.
    axes.patch.set(facecolor="#e6e6e6", hatch="////", edgecolor="#999999")
    if values.size <= NUMBERED_CELLS and style.cell_inches(axes, values.shape[1]) > 0.3:
        for layer, head in np.argwhere(~np.isnan(values)):
            value = float(values[layer, head])
            text = f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
            style.number(axes, image, layer, head, value, text)
    axes.set(xlabel="head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if bar:
        style.colour_bar(axes, image, label)


def head_maps(
    figure: Any,
    states: Mapping[str, np.ndarray],
    label: str,
    *,
    diverging: bool = False,
    least: float = 1e-9,
) -> None:
    """A map for each state, with one scale, and of every later state the change from the first.

    ``states`` has (L, H) values by the state's name; the rest is as of :func:`head_map`.
    """
    (first, base), *later = states.items()
    limits = _limits(list(states.values()), diverging=diverging, least=least)
    panels = figure.subplots(1, 2 * len(states) - 1, squeeze=False)[0]
    for index, (panel, (name, state)) in enumerate(zip(panels, states.items(), strict=False)):
        # One scale, so one colour bar is enough.
        last = index == len(later)
        head_map(panel, state, label, limits=limits, diverging=diverging, bar=last)
        panel.set_title(style.plain(name, 24))
    for panel, (name, state) in zip(panels[len(states) :], later, strict=True):
        head_map(panel, state - base, "change", diverging=True, least=least)
        panel.set_title(style.plain(f"{name} − {first}", 28))
    for panel in panels:
        panel.label_outer()


def detectors(axes: Any, magnitude: np.ndarray, induction: np.ndarray) -> None:
    """Two notions of induction head: a point for every head, coloured by its layer.

    ``magnitude`` (L, H) is attention on the label tokens, ``induction`` (L, H) on the token behind
    the earlier occurrence, on repeated random tokens; NaN where there is no head.
    """
    known = ~(np.isnan(magnitude) | np.isnan(induction))
    layers = np.broadcast_to(np.arange(len(magnitude))[:, None], magnitude.shape)
    points = axes.scatter(
        induction[known], magnitude[known], c=layers[known], cmap=style.COLOUR_MAP, s=16,
        vmin=0, vmax=max(1, len(magnitude) - 1), linewidths=0.4, edgecolors="black", clip_on=False,
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    axes.set(
        xlim=(0, 1), ylim=(0, 1), ylabel="magnitude: attention\non labels (share)",
        xlabel="induction on repeated random tokens\n(share of attention)",
    )  # fmt: skip
    style.colour_bar(axes, points, "layer").locator.set_params(integer=True)


def label_attention(axes: Any, states: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Attention on label tokens, layer by layer (the paper's figure 4); the gold label's is dashed.

    For each state's name (L,) means over heads of the attention on all label tokens, and (L,) of
    the part of it on labels equal to the gold one.
    """
    for index, (name, (every, gold)) in enumerate(states.items()):
        layers, state = np.arange(len(every)), style.plain(name, 28)
        style.line(axes, index, layers, every, f"{state}, all labels", dashes=0)
        style.line(axes, index, layers, gold, f"{state}, gold label", dashes=1, hollow=True)
    _over_layers(axes, "attention of the last position (share)")


def shift(axes: Any, norms: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> None:
    """How far fine-tuning moved each layer's weights (the paper's appendix B).

    For each name (L,) Frobenius norms of W' - W, and (L,) standard deviations over runs or None.
    """
    for index, (name, (values, spread)) in enumerate(norms.items()):
        style.line(axes, index, np.arange(len(values)), values, name, spread)
    _over_layers(axes, "Frobenius norm of the change")


def quantities(curves: Mapping[str, Curves]) -> list[str]:
    """Those training quantities for which some run has a number: one panel each."""
    return [
        name
        for name in QUANTITIES
        if any(name in run and not np.isnan(run[name]).all() for run in curves.values())
    ]


def training_height(curves: Mapping[str, Curves]) -> float:
    """Inches of :func:`training_curves`."""
    return max(2.4, 0.8 + 0.75 * len(quantities(curves)))


def training_curves(
    figure: Any,
    curves: Mapping[str, Curves],
    spread: Mapping[str, Curves] | None = None,
) -> None:
    """Loss, its terms, heads, A and validation over the prompts seen (the paper's figure 5).

    A panel for each quantity, a line in it for each run.

    ``curves`` has by the run's name (U,) arrays by the names of ``QUANTITIES``, NaN where not
    measured, and ``seen_examples``, the training prompts after each update; ``spread`` half the
    height of a band around each of them.
    """
    shown = quantities(curves)
    panels = figure.subplots(max(1, len(shown)), sharex=True, squeeze=False)[:, 0]
    for panel, quantity in zip(panels, shown, strict=False):
        label, factor = QUANTITIES[quantity]
        for index, (name, run) in enumerate(curves.items()):
            if quantity not in run:
                continue
            known = ~np.isnan(run[quantity])
            around = (spread or {}).get(name, {}).get(quantity)
            style.line(
                panel, index, run["seen_examples"][known], factor * run[quantity][known], name,
                None if around is None else factor * around[known],
                markers=quantity == "validation_accuracy" or known.sum() == 1,
            )  # fmt: skip
        panel.set_ylabel(label, fontsize=style.SMALL_POINTS)
    panels[-1].set_xlabel("training prompts seen")
    if len(curves) > 1:
        style.legend(panels[0])


def lines(
    axes: Any,
    series: Iterable[Series],
    x_label: str,
    *,
    level: tuple[str, float | None] = ("", None),
    log_ticks: Sequence[float] | None = None,
) -> None:
    """Curves with bands and a legend; rates become percent.

    Args:
        axes: a matplotlib Axes.
        series: what to draw.
        x_label: of the axis.
        level: name and height of a horizontal line; no line where the height is None.
        log_ticks: numbers on a logarithmic x axis; of an empty list matplotlib chooses them.
    """
    from matplotlib.ticker import LogLocator

    for index, (name, x, y, spread) in enumerate(series):
        style.line(axes, index, x, 100 * y, name, None if spread is None else 100 * spread)
    if level[1] is not None:
        axes.axhline(100 * level[1], color="black", linewidth=1, linestyle=":", label=level[0])
    if log_ticks is not None:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if len(log_ticks):
            axes.set_xticks(log_ticks, [f"{value:g}" for value in log_ticks])
    _finish(axes, x_label, "accuracy (%)")


def bars(
    axes: Any,
    methods: Sequence[str],
    values: np.ndarray,
    spread: np.ndarray,
    columns: Sequence[str],
    label: str = "accuracy (%)",
    zero_shot: Sequence[float] = (),
) -> None:
    """Grouped bars of methods.

    ``values`` and their ``spread`` over seeds are (M, J) for J columns; ``zero_shot`` has a level
    for each method.
    """
    width = 0.8 / len(methods)
    places = np.arange(len(columns), dtype=np.float64)
    for index, method in enumerate(methods):
        colour, left = style.colour(index), places + (index - (len(methods) - 1) / 2) * width
        axes.bar(
            left, 100 * values[index], width, yerr=100 * np.nan_to_num(spread[index]),
            label=style.name(method), color=colour, edgecolor="white",
            hatch=style.cycled(style.HATCHES, index),
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )  # fmt: skip
        if len(zero_shot) and not np.isnan(zero_shot[index]):
            axes.axhline(
                100 * zero_shot[index], color=colour, linestyle="--", linewidth=1,
                label=f"{style.name(method)}, zero-shot",
            )  # fmt: skip
    shown = [style.plain(column, 24) for column in columns]
    slanted = max(map(len, shown)) * 0.07 > style.cell_inches(axes, len(columns))
    how = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(places, shown, **how)
    axes.set_ylim(0, 100)
    _finish(axes, "", label)


def grid(
    axes: Any,
    accuracy: np.ndarray,
    punish: Sequence[float],
    reward: Sequence[float],
    limits: tuple[float, float],
    title: str,
) -> None:
    """Accuracy (A, B) over A punish weights and B reward weights (the paper's figure 6).

    ``limits`` are those of the colours, the same for grids to be compared.
    """
    low, high = (100 * end for end in limits)
    image = axes.imshow(
        100 * accuracy, origin="lower", aspect="auto", cmap=style.COLOUR_MAP, vmin=low,
        vmax=max(high, low + 1e-9),
    )  # fmt: skip
    for row, column in np.argwhere(~np.isnan(accuracy)):
        value = 100 * accuracy[row, column]
        style.number(axes, image, row, column, value, f"{value:.1f}")
    axes.set_xticks(range(len(reward)), [f"{value:g}" for value in reward])
    axes.set_yticks(range(len(punish)), [f"{value:g}" for value in punish])
    axes.set_title(style.plain(title, 40))
    style.colour_bar(axes, image, "accuracy (%)")
    _finish(axes, "reward weight B", "punish weight A at the start")


def plane(axes: Any, accuracy: np.ndarray, factors: np.ndarray, names: tuple[str, str]) -> None:
    """Accuracy on the plane of a base and two fine-tunings of it (the paper's figures 7 and 9).

    ``accuracy`` is (F, F), the first method's factor (the horizontal axis) by the second's; both
    have the ``factors`` (F,).
    """
    values = 100 * accuracy.T
    levels = np.linspace(values.min(), max(values.max(), values.min() + 1e-6), 12)
    filled = axes.contourf(factors, factors, values, levels=levels, cmap=style.COLOUR_MAP)
    best = np.unravel_index(int(np.argmax(accuracy)), accuracy.shape)
    for name, x, y, mark in (
        ("base", 0.0, 0.0, "o"),
        (names[0], 1.0, 0.0, "s"),
        (names[1], 0.0, 1.0, "^"),
        ("best", factors[best[0]], factors[best[1]], "*"),
    ):
        at = accuracy[np.isclose(factors, x)][:, np.isclose(factors, y)]
        label = style.name(name) + "".join(f" ({100 * value:.1f})" for value in at.flat)
        axes.plot([x], [y], mark, color="white", markeredgecolor="black", markersize=8, label=label)
    axes.plot([1, 0], [0, 1], color="white", linestyle="--", linewidth=1)
    style.colour_bar(axes, filled, "accuracy (%)")
    first, second = (f"factor of {style.plain(name, 24)}" for name in names)
    _finish(axes, first, second)


def extrapolation(
    axes: Any, factors: np.ndarray, validation: np.ndarray, test: np.ndarray, chosen: np.ndarray
) -> None:
    """Accuracy over the factor of an adapter, which the paper left open beyond 1.

    ``factors`` is (F,), ``validation`` and ``test`` are (R, F), a row for each run, with bands of
    one standard deviation; ``chosen`` (R,) is what each run's validation prompts chose.
    """
    axes.axvline(1, color="black", linewidth=1, linestyle=":", label="as trained")
    axes.plot(
        chosen, np.full(len(chosen), 0.02), style.MARKERS[2], color=style.colour(2), clip_on=False,
        transform=axes.get_xaxis_transform(), label="chosen on validation",
    )  # fmt: skip
    tables = (("validation", validation), ("test", test))
    series = [(name, factors, *mean_and_deviation(values)) for name, values in tables]
    lines(axes, series, "factor of the adapter")


def confusion(axes: Any, counts: np.ndarray, names: Sequence[str], *, bar: bool = True) -> None:
    """Which classes are taken for which: gold classes downwards, answers to the right.

    ``counts`` (C, C) stand in the cells of up to 14 classes; of more classes every n-th is named.
    Colours are shares of the gold class.
    """
    share = 100.0 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    image = axes.imshow(
        share, cmap=style.COLOUR_MAP, vmin=0, vmax=100, interpolation="none", aspect="auto"
    )
    room = style.cell_inches(axes, len(names))
    if len(names) <= NUMBERED_CLASSES and room > 0.07 * len(f"{int(counts.max()):,}"):
        for row, column in np.ndindex(counts.shape):
            text = f"{int(counts[row, column]):,}"
            style.number(axes, image, row, column, share[row, column], text)
    every = max(1, round(0.13 / min(room, style.cell_inches(axes, len(names), vertical=True))))
    shown = {place: style.plain(names[place], 16) for place in range(0, len(names), every)}
    flat = room > 0.07 * max(map(len, shown.values()))
    axes.set_xticks([*shown], [*shown.values()], rotation=0 if flat else 90)
    axes.set_yticks([*shown], [*shown.values()])
    axes.set(xlabel="answer", ylabel="gold label")
    if bar:
        style.colour_bar(axes, image, "share of the gold label (%)")


def confusions(figure: Any, states: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """A confusion matrix for each state's name, side by side."""
    panels = figure.subplots(1, len(states), squeeze=False)[0]
    for panel, (name, counts) in zip(panels, states.items(), strict=True):
        confusion(panel, counts, names, bar=panel is panels[-1])
        panel.set_title(style.plain(name, 28))
        panel.label_outer()


def reliability(figure: Any, states: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """How often answers are right at each confidence, and how many prompts are there.

    For each state's name (bins,) arrays ``confidence`` and ``accuracy``, NaN for an empty bin, and
    ``count``.
    """
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":", label="calibrated")
    for index, (name, bins) in enumerate(states.items()):
        count = bins["count"]
        bin_width = 100 / len(count)
        width = 0.9 * bin_width / len(states)
        known = count > 0
        x, y = 100 * bins["confidence"][known], 100 * bins["accuracy"][known]
        style.line(upper, index, x, y, name)
        left = bin_width * (np.arange(len(count)) + 0.05) + width * (index + 0.5)
        lower.bar(
            left, count, width, color=style.colour(index), edgecolor="white",
            hatch=style.cycled(style.HATCHES, index), label=style.name(name),
        )  # fmt: skip
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy (%)")
    lower.set(xlabel="confidence of the answer (%)", ylabel="prompts")
    lower.yaxis.get_major_locator().set_params(integer=True, nbins=3)
    style.legend(upper)


def mean_and_deviation(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis; 0 for one run."""
    middle = runs.mean(axis=0)
    return middle, runs.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(middle)


def _spaced(
    axes: Any, count: int, first: Iterable[int] = (), *, vertical: bool = False
) -> list[int]:
    """Places along an axis whose texts do not touch; of two in ``first`` the earlier counts."""
    length = count * style.cell_inches(axes, count, vertical=vertical)
    fitting = max(2, int(72 * length / (1.25 * style.SMALL_POINTS)))
    taken: list[int] = []
    for place in (*first, *range(0, count, max(1, -(-count // fitting)))):
        if all(abs(place - other) >= max(1, count / fitting) for other in taken):
            taken.append(place)
    return sorted(taken)


def _token(text: str) -> str:
    """A token's text on an axis: without blanks around it, or in quotes where it is all blank."""
    shown = text.strip(" ")
    return style.plain(shown, 14) if shown else f'"{text[:12]}"'


def _limits(states: Sequence[np.ndarray], *, diverging: bool, least: float) -> tuple[float, float]:
    """Lowest and highest value of a scale."""
    known = np.concatenate([state[~np.isnan(state)].ravel() for state in states])
    if diverging:
        most = max(least, float(np.abs(known).max(initial=0.0)))
        return -most, most
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return low, max(high, low + least)


def _over_layers(axes: Any, y: str) -> None:
    """Finish a figure whose x axis is the layer and whose lines start at 0 or above."""
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _finish(axes, "layer", y)


def _finish(axes: Any, x: str, y: str) -> None:
    """Axis labels and legend of a figure of one Axes."""
    axes.set(xlabel=x, ylabel=y)
    style.legend(axes)
