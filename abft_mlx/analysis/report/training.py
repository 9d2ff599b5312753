"""How a run trained: its curves, and what its weights and heads did layer by layer."""

from __future__ import annotations

import numpy as np

from abft_mlx.analysis.report.chart import Chart, Series
from abft_mlx.analysis.run_files import RunFiles
from abft_mlx.documents import find, number
from abft_mlx.induction import Heads


def curves(run: RunFiles) -> list[Chart]:
    """Loss, its two terms, induction heads, A and validation, over updates."""
    lines = run.metrics
    steps = [float(one["step"]) for one in lines]

    def series(name: str, key: str) -> Series:
        return Series(name, steps, [number(one, key) for one in lines])

    def known(key: str) -> bool:
        return any(number(one, key) is not None for one in lines)

    abft = find(run.recipe, "objective", "kind") in (None, "abft")
    made = []
    if known("loss"):
        what = "equation 1, mean of an update" if abft else "cross-entropy of the label, nats"
        made.append(_over_updates("Loss", what, [series("loss", "loss")]))
    if abft and known("punish") and known("reward"):
        two = [series("punish", "punish"), series("reward", "reward")]
        made.append(_over_updates("The loss's two terms", "mean of an update, before A and B", two))
    if known("induction_heads"):
        one = [series("induction heads", "induction_heads")]
        made.append(_over_updates("Induction heads", "heads above the filter, per prompt", one))
    if abft and known("A"):
        one = [series("A", "A")]
        made.append(_over_updates("Punish weight A", "as the controller set it", one))
    validated = [one for one in lines if number(one, "validation_accuracy") is not None]
    if validated:
        x = [float(one["step"]) for one in validated]
        y = [number(one, "validation_accuracy") for one in validated]
        before = number(run.run, "validation", "before")
        if before is not None and x[0] > 0:
            x, y = [0.0, *x], [before, *y]
        prompts = number(run.run, "validation", "prompts")
        what = "accuracy" + ("" if prompts is None else f" on {prompts:,} prompts")
        made.append(_over_updates("Validation", what, [Series("accuracy", x, y)], percent=True))
    return made


def _over_updates(title: str, what: str, series: list[Series], *, percent: bool = False) -> Chart:
    return Chart(title, "update", what, series, unit="update", percent=percent)


def shift(run: RunFiles) -> Chart | None:
    """How far W_Q and W_K moved in every layer."""
    series = []
    for key, name in (("q", "W_Q"), ("k", "W_K")):
        norms = find(run.run, "shift", key)
        if isinstance(norms, list) and norms:
            values = [one if isinstance(one, (int, float)) else None for one in norms]
            series.append(Series(name, list(range(len(values))), values))
    if not series:
        return None
    head = number(run.run, "shift", "head")
    note = None if head is None else f"The LM head moved by {head:.4g}."
    return Chart(
        "Parameter shift", "layer", "Frobenius norm of the change of each layer's weights", series,
        unit="layer", from_zero=True, note=note,
    )  # fmt: skip


def label_attention(heads: Heads) -> Chart:
    """Attention on labels and on right labels, layer by layer, in every state."""
    series = []
    for name, state in heads.states.items():
        magnitude, correctness = _by_layer(state.magnitude), _by_layer(state.correctness)
        layers = list(range(len(magnitude)))
        series.append(Series(f"{name}, all labels", layers, magnitude.tolist()))
        # Magnitude is right plus wrong, correctness right less wrong.
        right = (magnitude + correctness) / 2
        series.append(Series(f"{name}, right labels", layers, right.tolist()))
    return Chart(
        "Attention on labels", "layer", "share of the last position's attention", series[:4],
        unit="layer", percent=True,
        note=f"Means over a layer's heads and {heads.prompts:,} prompts.",
    )  # fmt: skip


def _by_layer(table: np.ndarray) -> np.ndarray:
    """(L,) means over heads; NaN for a layer without heads."""
    known = (~np.isnan(table)).sum(axis=1)
    total = np.nansum(table, axis=1)
    return np.divide(total, known, out=np.full(len(table), np.nan), where=known > 0)
