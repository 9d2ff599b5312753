"""What a run came to: measures with intervals, confusion, reliability; from its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abft_mlx.analysis.report.chart import Chart, Series
from abft_mlx.analysis.report.html import Markup, element, join, table, titled
from abft_mlx.analysis.run_files import RunFiles
from abft_mlx.analysis.text import NOTHING, p_value, points
from abft_mlx.documents import find, number

MEASURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "expected_calibration_error": "calibration error (ECE)",
    "true_label_probability": "true-label probability",
}
_NAMES_ACROSS = 6
_NUMBERS_SHOWN = 14
_CONFUSIONS_SHOWN = 10

Measured = list[tuple[str, str, Mapping[str, Any]]]


def measured(run: RunFiles) -> Measured:
    """(base or adapter, method, its numbers), method by method, the base first."""
    document = run.evaluation or {}
    methods = document.get("methods", {})
    base = find(document, "base", "methods") or {}
    with_adapter = bool(document.get("adapter") or base)
    found: Measured = []
    for name in dict.fromkeys([*base, *methods]):
        if name in base:
            found.append(("base", name, base[name]))
        if name in methods:
            found.append(("adapter" if with_adapter else "base", name, methods[name]))
    return found


def rate(value: float | None) -> str:
    """A rate in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}%"


def interval(method: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Both ends of a measure's 95% interval, where they were measured."""
    ends = find(method, "interval", key)
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = (number({"end": one}, "end") for one in ends)
    return None if low is None or high is None else (low, high)


def measures_table(run: RunFiles) -> Markup:
    """Every measure with its interval, the accuracy also as a picture."""
    found = measured(run)
    rows = []
    for who, method, values in found:
        cells: list[Any] = [f"{who}, {method}"]
        for key in MEASURES:
            ends = interval(values, key)
            cells.append(
                join(
                    rate(number(values, key)),
                    None
                    if ends is None
                    else element("small", f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"),
                    _dots(values) if key == "accuracy" else None,
                )
            )
        rows.append(cells)
    header = ["", *MEASURES.values()]
    document = run.evaluation or {}
    n = number(document, "prompts")
    of = "" if n is None else f" on {n:,} test prompts"
    caption = f"Measures{of}, with 95% intervals; the dots stand between 0 and 100%"
    return table(header, rows, caption=caption)


def how_measured(run: RunFiles) -> Markup:
    """n, demonstrations and seeds of the evaluation, and the paired tests."""
    document = run.evaluation or {}
    parts = []
    n, k, seed = (number(document, key) for key in ("prompts", "k", "seed"))
    if n is not None:
        parts.append(f"n = {n:,} prompts")
    if k is not None:
        parts.append(f"{k} demonstrations each")
    if seed is not None:
        parts.append(f"test prompts and demonstrations drawn with seed {seed}")
    trained = number(run.recipe, "training", "seed")
    if trained is not None:
        parts.append(f"one training, with seed {trained}")
    told = "; ".join(parts) or "test prompts"
    lines = [
        f"Measured on {told}. The intervals are bootstrap percentiles over prompts; they do not "
        "say what another training seed would do."
    ]
    compared = document.get("comparisons")
    for one in compared if isinstance(compared, list) else []:
        first, second = (_named(find(one, key), run) for key in ("first", "second"))
        p, gained, lost = (number(one, key) for key in ("p_value", "only_first", "only_second"))
        if p is not None and gained is not None and lost is not None:
            word = p_value(p) if p < 0.001 else f"= {p_value(p)}"
            lines.append(
                f"{first[0].upper()}{first[1:]} against {second}, on the same prompts: {gained:,} "
                f"right where the other is wrong, {lost:,} the other way round (exact McNemar "
                f"test, p {word})."
            )
    return join(*(element("p", one) for one in lines))


def _named(side: Any, run: RunFiles) -> str:
    """One side of a comparison in words: ``base.vanilla`` is the base's."""
    name = str(side)
    if name.startswith("base."):
        return f"the base ({name.removeprefix('base.')})"
    who = "the adapter" if find(run.evaluation, "base") else "the base"
    return f"{who} ({name})"


def headline(run: RunFiles) -> Markup | None:
    """The gain in one line, of the first method that base and adapter share."""
    by_method: dict[str, dict[str, Mapping[str, Any]]] = {}
    for who, method, values in measured(run):
        by_method.setdefault(method, {})[who] = values
    for method, both in by_method.items():
        if len(both) == 2:
            before, after = both["base"]["accuracy"], both["adapter"]["accuracy"]
            return join(
                f"Accuracy ({method}) ",
                element("strong", f"{rate(before)} → {rate(after)}"),
                f", {points(after - before)} points",
            )
    return None


def confusions(run: RunFiles) -> list[Markup]:
    """A confusion matrix for each measurement that has one."""
    names = [str(one) for one in (run.evaluation or {}).get("labels", [])]
    made = []
    for who, method, values in measured(run):
        counts = values.get("confusion")
        if names and counts and _square(counts, len(names)):
            made.append(confusion(names, counts, f"Confusion: {who}, {method}"))
    return made


def confusion(names: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> Markup:
    """Gold labels down, predictions across, each row coloured by its shares.

    Args:
        names: C labels.
        counts: (C, C) prompts.
        title: its caption.
    """
    wide = len(names) > _NAMES_ACROSS
    head = [
        element("th", f"{n + 1}" if wide else name, scope="col", title=name if wide else None)
        for n, name in enumerate(names)
    ]
    lines = []
    for row, (name, values) in enumerate(zip(names, counts, strict=True)):
        total = sum(values) or 1
        cells = [
            element(
                "td",
                f"{value:,}" if value or len(names) <= _NUMBERS_SHOWN else "",
                style=f"--a:{value / total:.3f}",
                class_="right" if row == column else None,
            )
            for column, value in enumerate(values)
        ]
        label = f"{row + 1} {name}" if wide else name
        lines.append(element("tr", element("th", label, scope="row"), *cells))
    corner = element("th", "gold ↓ predicted →", scope="col")
    grid = element(
        "table",
        element("thead", element("tr", corner, *head)),
        element("tbody", *lines),
        class_="confusion numeric" + " many" * wide,
    )
    made = titled(grid, title)
    if not wide:
        return element("div", made)
    if len(names) > _NUMBERS_SHOWN:
        made = element("details", element("summary", f"{title}, {len(names)} labels"), made)
    return element("div", made, _frequent(names, counts, title))


def reliabilities(run: RunFiles) -> list[Chart]:
    """A reliability diagram for each method, base and adapter in one."""
    by_method: dict[str, list[Series]] = {}
    for who, method, values in measured(run):
        confidence = find(values, "reliability", "confidence")
        accuracy = find(values, "reliability", "accuracy")
        counts = find(values, "reliability", "count")
        if not (isinstance(confidence, list) and isinstance(accuracy, list)):
            continue
        if not isinstance(counts, list) or not len(counts) == len(confidence) == len(accuracy):
            continue
        known = [
            (x, y)
            for x, y in zip(confidence, accuracy, strict=True)
            if isinstance(x, (int, float)) and isinstance(y, (int, float))
        ]
        by_method.setdefault(method, []).append(
            Series(who, [x for x, _ in known], [y for _, y in known])
        )
    return [
        Chart(
            f"Reliability, {method}",
            "mean confidence of a bin (%)",
            "accuracy in the bin",
            series,
            unit="confidence",
            percent=True,
            x_percent=True,
            diagonal=True,
            note="On the dashed line confidence equals accuracy; ten bins of equal width, empty "
            "ones left out.",
        )
        for method, series in by_method.items()
    ]


def other_numbers(run: RunFiles) -> Markup | None:
    """What other protocols measured, number by number."""
    document = run.evaluation or {}
    base = document.get("base") or {}
    rows = []
    for part in ("robustness", "bias", "unseen", "transfer"):
        ours, theirs = dict(_leaves(document.get(part))), dict(_leaves(base.get(part)))
        for key in dict.fromkeys([*ours, *theirs]):
            name = ": ".join((part, *key)).replace("_", " ")
            rows.append([name, _plain(theirs.get(key)), _plain(ours.get(key))])
    if not rows:
        return None
    return table(["", "base", "adapter"], rows, caption="Other protocols")


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], float]]:
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in _leaves(one, (*keys, str(key)))]
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [(keys, value)] if good else []


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def _square(counts: Any, size: int) -> bool:
    return (
        isinstance(counts, list)
        and len(counts) == size
        and all(
            isinstance(row, list)
            and len(row) == size
            and all(isinstance(one, int) and one >= 0 for one in row)
            for row in counts
        )
    )


def _frequent(names: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> Markup:
    """The most frequent confusions, where the matrix is too large to read."""
    wrong = [
        (value, row, column)
        for row, values in enumerate(counts)
        for column, value in enumerate(values)
        if value and row != column
    ]
    wrong.sort(key=lambda one: (-one[0], one[1], one[2]))
    if not wrong:
        return element("p", "No prompt was answered wrongly.")
    items = [
        element("li", f"{names[row]} taken for {names[column]}: {value:,}")
        for value, row, column in wrong[:_CONFUSIONS_SHOWN]
    ]
    return join(element("p", f"{title}: the most frequent ones"), element("ol", *items))


def _dots(values: Mapping[str, Any]) -> Markup:
    """Accuracy as a point with its interval."""
    at = number(values, "accuracy") or 0.0
    ends = interval(values, "accuracy")
    whisker = None
    if ends is not None:
        whisker = element("line", x1=f"{2 + 96 * ends[0]:.2f}", x2=f"{2 + 96 * ends[1]:.2f}",
                          y1=6, y2=6, class_="whisker")  # fmt: skip
    return element(
        "svg", element("line", x1=2, x2=98, y1=6, y2=6, class_="grid"), whisker,
        element("circle", cx=f"{2 + 96 * at:.2f}", cy=6, r="1.7", class_="mark s0"),
        viewBox="0 0 100 12", class_="dots", aria_hidden="true",
    )  # fmt: skip
