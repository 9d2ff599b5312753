"""The panel that shows attention over the prompts' own text, head by head.

Everything is there without a script, for the head that is chosen first; the script moves to others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.report.head_map import first_head, head_map, map_data, numbers, percent
from abft_mlx.analysis.report.html import Markup, element, join, visible
from abft_mlx.analysis.report.packing import Packed
from abft_mlx.induction import Example, Heads

STATE_NAMES = {"before": "before (base model)", "after": "after (with the adapter)"}


def panel(heads: Heads) -> tuple[Markup, dict[str, Any]]:
    """The map of heads, the prompts under it, and what the script needs.

    Returns:
        The section's content, and its data: see ``script.js``.
    """
    layer, head = first_head(heads)
    packed = [{name: Packed.of(rows) for name, rows in one.rows.items()} for one in heads.examples]
    content = join(
        element(
            "p",
            "Each cell of the map is a head. Point at one, tap it, or go through them with the "
            "arrow keys: the prompt's tokens light up with the attention of its last position. "
            "A click keeps a head, so that the pointer can go to the tokens for their values."
            if heads.examples
            else "Each cell of the map is a head. No prompt was kept with its attention.",
        ),
        element(
            "div",
            head_map(heads, (layer, head)),
            element(
                "div",
                _chooser(heads) if len(heads.examples) > 1 else None,
                *(
                    _example(heads, n, one, packed[n], (layer, head))
                    for n, one in enumerate(heads.examples)
                ),
                class_="prompts",
            )
            if heads.examples
            else None,
            class_="attention",
            id="attention-panel",
        ),
        element(
            "p",
            "Tokens are coloured relative to the head's largest value on the prompt in all states. "
            "This page keeps attention in steps of a 255th of each head's largest value: a token's "
            "percentage is right to 0.2 points; sums over labels are made before that. "
            "✓ marks a demonstration's label that equals the gold one, ✗ one that does not.",
            class_="note",
        )
        if heads.examples
        else None,
    )
    data = map_data(heads, (layer, head))
    data["examples"] = [_data(one, packed[n]) for n, one in enumerate(heads.examples)]
    return content, data


def on_labels(example: Example, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention on right and on wrong labels.

    Args:
        example: whose labels.
        rows: (L, H, T) of one state.

    Returns:
        (L, H) float64 each.
    """
    at = rows[:, :, example.label_positions].astype(np.float64)
    right = example.demonstration_labels == example.gold
    return at[:, :, right].sum(axis=-1), at[:, :, ~right].sum(axis=-1)


def _data(example: Example, packed: dict[str, Packed]) -> dict[str, Any]:
    states = {}
    for name, one in packed.items():
        right, wrong = on_labels(example, example.rows[name])
        states[name] = {
            "rows": one.text(),
            "scales": numbers(one.scales, 9),
            "right": numbers(right, 5),
            "wrong": numbers(wrong, 5),
        }
    return {
        "tokens": len(example.tokens),
        "labels": example.label_positions.tolist(),
        "states": states,
    }


def _chooser(heads: Heads) -> Markup:
    options = [
        element(
            "label",
            element("input", type="radio", name="example", value=n, checked=n == 0),
            element("span", f"prompt {n + 1}: gold label ", element("b", heads.labels[one.gold])),
        )
        for n, one in enumerate(heads.examples)
    ]
    return element(
        "fieldset", element("legend", "Prompt"), *options, class_="choice scripted"
    )  # fmt: skip


def _example(
    heads: Heads, n: int, example: Example, packed: dict[str, Packed], chosen: tuple[int, int]
) -> Markup:
    right = example.demonstration_labels == example.gold
    told = join(
        *(
            join(heads.labels[label], " ✓" if good else " ✗")
            for label, good in zip(example.demonstration_labels, right, strict=True)
        ),
        between=", ",
    )
    values = {name: one.head(*chosen) for name, one in packed.items()}
    most = max((float(one.max()) for one in values.values()), default=0.0)
    return element(
        "div",
        element("h3", f"Prompt {n + 1}"),
        element(
            "p", "Gold label ", element("b", heads.labels[example.gold]),
            "; the demonstrations' labels are ", told, ".",
        ),
        _numbers(heads, example, chosen),
        element(
            "output",
            "Point at a token for its value, or go through the text with the arrow keys.",
            class_="reading token-reading scripted",
        ),
        element(
            "div",
            *(
                element(
                    "div",
                    element("h4", STATE_NAMES.get(name, name)),
                    _tokens(example, right, values[name], most, name, n),
                    class_="state",
                )
                for name in example.rows
            ),
            class_="states",
        ),
        class_="example",
        data_example=n,
    )  # fmt: skip


def _numbers(heads: Heads, example: Example, chosen: tuple[int, int]) -> Markup:
    """What the chosen head does: on this prompt, and on average."""
    layer, head = chosen
    rows = []
    sums = {name: on_labels(example, one) for name, one in example.rows.items()}
    for title, key, read in (
        ("on labels", "labels", lambda name: sums[name][0] + sums[name][1]),
        ("on right labels ✓", "right", lambda name: sums[name][0]),
        ("on wrong labels ✗", "wrong", lambda name: sums[name][1]),
    ):
        cells = [
            element("td", percent(float(read(name)[layer, head])), data_state=name)
            for name in example.rows
        ]
        rows.append(element("tr", element("th", title, scope="row"), *cells, data_row=key))
    header = element(
        "tr",
        element("th", f"layer {layer}, head {head}", scope="col", class_="which"),
        *(element("th", name, scope="col") for name in example.rows),
    )
    del heads
    return element(
        "table", element("thead", header), element("tbody", *rows), class_="numeric head-numbers"
    )


def _tokens(
    example: Example, right: np.ndarray, values: np.ndarray, most: float, state: str, n: int
) -> Markup:
    marked = dict(zip(example.label_positions.tolist(), right.tolist(), strict=True))
    spans = [
        _token(token, index, float(values[index]), most, marked.get(index))
        for index, token in enumerate(example.tokens)
    ]
    return element(
        "div", *spans, class_="tokens", dir="ltr", tabindex="0", role="group",
        aria_label=f"prompt {n + 1}, {STATE_NAMES.get(state, state)}: arrow keys read each token",
        data_state=state,
    )  # fmt: skip


def _token(token: str, index: int, value: float, most: float, right: bool | None) -> Markup:
    strength = value / most if most > 0 else 0.0
    style = f"--a:{strength:.3f}"
    shown = _shown(token)
    if right is None:
        return element("span", shown, class_="token", style=style)
    return element(
        "span",
        element("bdi", shown),
        element("i", "✓" if right else "✗", aria_hidden="true"),
        element("span", " (right label)" if right else " (wrong label)", class_="unseen"),
        element("small", percent(value)),
        class_="token label right" if right else "token label wrong",
        style=style,
        data_at=index,
    )


def _shown(token: str) -> str:
    """A token whose white space can be seen."""
    if not token:
        return "∅"
    return visible(token).replace("\t", "⇥\t").replace("\n", "⏎\n")
