"""Figures of heads: attention over tokens, maps of layers by heads, lines over layers.

Each function draws on a matplotlib Axes, which it returns, or on an empty Figure, and returns its
Axes. Letters: L layers, H heads, R rows of heads, T tokens, K demonstrations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style

__all__ = ["attention_map", "attention_maps", "detectors", "head_map", "head_maps",
           "label_attention", "shift"]  # fmt: skip
RIGHT, WRONG = "label equal to the gold one", "other label"
QUERY_TOKENS = 6
NUMBERED_CELLS = 96


def attention_map(
    axes: Any,
    rows: np.ndarray,
    tokens: Sequence[str],
    label_positions: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
    *,
    last: bool = True,
    bar: bool = True,
) -> Any:
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
        bar: draw the colour bar.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.transforms import offset_copy

    image = axes.imshow(
        np.ma.masked_invalid(rows), aspect="auto", interpolation="none", cmap=style.COLOUR_MAP,
        norm=PowerNorm(0.5, vmin=0, vmax=1),
    )  # fmt: skip
    above = offset_copy(axes.get_xaxis_transform(), axes.figure, y=4, units="points")
    for chosen, mark, index, name in ((right, "v", 0, RIGHT), (~right, "x", 1, WRONG)):
        where = np.asarray(label_positions)[np.asarray(chosen, dtype=bool)]
        (marks,) = axes.plot(
            where, np.full(len(where), 1.0), mark, color=style.colour(index), clip_on=False,
            transform=above, label=name, linestyle="none",
        )  # fmt: skip
        marks.set_in_layout(False)  # without points its place would be the figure's corner
    axes.set_xlim(-0.5, len(tokens) - 0.5)
    places: list[int] = []
    if last:
        end = len(tokens) - 1
        query = range(end, max(end - QUERY_TOKENS, -1), -1)
        wanted = [end, *map(int, label_positions), 0, *query]
        places = spaced(len(tokens), _room(axes, len(tokens)), wanted)
        axes.set_xlabel("token of the prompt")
    axes.set_xticks(places, [_token(tokens[place]) for place in places], rotation=90)
    heads = spaced(len(names), _room(axes, len(names), vertical=True))
    axes.set_yticks(heads, [style.plain(names[head], 20) for head in heads])
    axes.tick_params(length=2)
    if bar:
        style.colour_bar(axes, image, "attention (share)").set_ticks([0, 0.1, 0.5, 1])
    if axes.get_subplotspec().is_first_row():
        style.legend(axes)
    return axes


def attention_maps(
    figure: Any,
    states: Sequence[np.ndarray],
    tokens: Sequence[str],
    label_positions: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
    state_names: Sequence[str],
) -> list[Any]:
    """Several states of a model over one prompt, one above the other.

    ``states`` are (R, T) each, the same heads in all; the rest is as of :func:`attention_map`.
    """
    panels = figure.subplots(len(states), squeeze=False)[:, 0]
    for panel, rows, name in zip(panels, states, state_names, strict=True):
        attention_map(panel, rows, tokens, label_positions, right, names, last=panel is panels[-1])
        panel.set_ylabel(style.plain(name, 20))
    return list(panels)


def head_map(
    axes: Any,
    values: np.ndarray,
    label: str,
    *,
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
    least: float = 1e-9,
    bar: bool = True,
) -> Any:
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
            number = f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
            shade = style.over(image, value)
            axes.text(
                head, layer, number, ha="center", va="center", color=shade,
                fontsize=style.SMALL_POINTS,
            )  # fmt: skip
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if bar:
        style.colour_bar(axes, image, label)
    return axes


def head_maps(
    figure: Any,
    states: Sequence[np.ndarray],
    names: Sequence[str],
    label: str,
    *,
    diverging: bool = False,
    least: float = 1e-9,
) -> list[Any]:
    """A map for each state, with one scale, and of every later state the change from the first.

    ``states`` are (L, H) each; the rest is as of :func:`head_map`. Maps stand side by side where
    the figure is wide.
    """
    count = 2 * len(states) - 1
    wide = figure.get_figwidth() > style.WIDTHS["column"] + 1
    panels = figure.subplots(*((1, count) if wide else (count, 1)), squeeze=False).ravel()
    limits = _limits(states, diverging=diverging, least=least)
    for index, (panel, state, name) in enumerate(zip(panels, states, names, strict=False)):
        # One scale, so one colour bar is enough where they stand in a row.
        bar = not wide or index == len(states) - 1
        head_map(panel, state, label, limits=limits, diverging=diverging, bar=bar)
        panel.set_title(style.plain(name, 24))
    for panel, state, name in zip(panels[len(states) :], states[1:], names[1:], strict=True):
        head_map(panel, state - states[0], "change", diverging=True, least=least)
        panel.set_title(style.plain(f"{name} − {names[0]}", 28))
    for panel in panels:
        panel.label_outer()
    return list(panels)


def detectors(axes: Any, magnitude: np.ndarray, induction: np.ndarray) -> Any:
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
    bar = style.colour_bar(axes, points, "layer")
    bar.locator.set_params(integer=True)
    return axes


def label_attention(
    axes: Any, on_labels: Sequence[np.ndarray], on_gold: Sequence[np.ndarray], names: Sequence[str]
) -> Any:
    """Attention on label tokens, layer by layer (the paper's figure 4); the gold label's is dashed.

    For each state (L,) means over heads of the attention on all label tokens, and of the part of
    it on labels equal to the gold one.
    """
    for index, (name, every, gold) in enumerate(zip(names, on_labels, on_gold, strict=True)):
        layers, state = np.arange(len(every)), style.plain(name, 28)
        style.line(axes, index, layers, every, f"{state}, all labels", dashes=0)
        style.line(axes, index, layers, gold, f"{state}, gold label", dashes=1, hollow=True)
    axes.set_ylabel("attention of the last position (share)")
    return _over_layers(axes)


def shift(
    axes: Any, shifts: Sequence[np.ndarray], spread: Sequence[np.ndarray], names: Sequence[str]
) -> Any:
    """How far fine-tuning moved each layer's weights (the paper's appendix B).

    For each name (L,) Frobenius norms of W' - W, and their standard deviations over runs.
    """
    for index, (name, norms, around) in enumerate(zip(names, shifts, spread, strict=True)):
        style.line(axes, index, np.arange(len(norms)), norms, name, spread=around)
    axes.set_ylabel("Frobenius norm of the change")
    return _over_layers(axes)


def spaced(count: int, fitting: int, first: Iterable[int] = ()) -> list[int]:
    """Those of ``count`` places that get a text, so that no two of the ``fitting`` texts touch.

    ``first`` are places to name, the most important first; of two that are too close the earlier.
    """
    taken: list[int] = []
    for place in (*first, *range(0, count, max(1, -(-count // fitting)))):
        if all(abs(place - other) >= max(1, count / fitting) for other in taken):
            taken.append(place)
    return sorted(taken)


def _room(axes: Any, count: int, *, vertical: bool = False) -> int:
    """How many lines of text fit along an axis."""
    length = count * style.cell_inches(axes, count, vertical=vertical)
    return max(2, int(72 * length / (1.25 * style.SMALL_POINTS)))


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


def _over_layers(axes: Any) -> Any:
    """Finish a figure whose x axis is the layer and whose lines start at 0 or above."""
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    style.legend(axes)
    return axes
