"""The layer × head map: one cell for each head, coloured by what it does."""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.report.html import Markup, element
from abft_mlx.induction import Heads

MEASURES = {
    "magnitude": ("magnitude", "attention on the demonstrations' labels"),
    "correctness": ("correctness", "attention on right labels minus on wrong ones"),
    "share": ("above filter", "share of prompts in which it is an induction head"),
    "sink": ("sink", "attention on the prompt's first token"),
}
# On repeated random tokens, where a file has them of every state.
DETECTED = {
    "previous_token": ("previous token", "on random text: attention on the token before"),
    "duplicate_token": ("duplicate token", "on random text: attention on the same token earlier"),
    "induction": ("repetition", "on random text: attention on what followed the same token"),
}
_WEIGHT = ("weight", "weight in the label-attention read-out, which gives the answer")
_SIGNED = ("correctness", "weight")
CHANGE = "change"


def first_head(heads: Heads) -> tuple[int, int]:
    """The head to begin with: whose correctness changed most, or that looks at labels most."""
    states = list(heads.states.values())
    if len(states) > 1:
        table = np.abs(states[-1].correctness - states[0].correctness)
    else:
        table = states[0].magnitude
    if not table.size or np.isnan(table).all():
        return 0, 0
    layer, head = np.unravel_index(int(np.nanargmax(table)), table.shape)
    return int(layer), int(head)


def measures(heads: Heads) -> dict[str, tuple[str, str, dict[str, np.ndarray]]]:
    """What heads can be coloured by: name, explanation, and (L, H) values in every state."""
    made = {
        key: (name, what, {state: getattr(one, key) for state, one in heads.states.items()})
        for key, (name, what) in MEASURES.items()
    }
    weights = [one.weight for one in heads.states.values() if one.weight is not None]
    if weights:
        # The state before has none: there the LM head answers.
        made["weight"] = (*_WEIGHT, dict.fromkeys(heads.states, weights[-1]))
    found = {state: one.detected for state, one in heads.states.items()}
    if all(one is not None for one in found.values()):
        for key, (name, what) in DETECTED.items():
            made[key] = (name, what, {state: getattr(one, key) for state, one in found.items()})
    return made


def map_data(heads: Heads, chosen: tuple[int, int]) -> dict[str, Any]:
    """What the script needs of the map."""
    layers, count = _shape(heads)
    return {
        "layers": layers,
        "heads": count,
        "prompts": heads.prompts,
        "states": list(heads.states),
        "start": list(chosen),
        "signed": list(_SIGNED),
        "measures": {
            key: {
                "name": name,
                "what": what,
                "mean": key in MEASURES,
                "values": {state: numbers(table, 5) for state, table in tables.items()},
            }
            for key, (name, what, tables) in measures(heads).items()
        },
    }


def head_map(heads: Heads, chosen: tuple[int, int]) -> Markup:
    """The map with its choosers, its scale and a reading; magnitude in the last state at first."""
    layers, count = _shape(heads)
    state, values = list(heads.states.items())[-1]
    table = values.magnitude
    most = float(max(np.nanmax(np.nan_to_num(one.magnitude)) for one in heads.states.values()))
    every = 1 if count <= 8 else 4 if count <= 32 else 8
    header = element(
        "tr",
        element("th", element("span", "layer", class_="unseen"), scope="col"),
        *(element("th", str(n) if n % every == 0 else "", scope="col") for n in range(count)),
        aria_hidden="true",
    )
    down = 1 if layers <= 16 else 4
    lines = [
        element(
            "tr",
            element("th", str(layer) if layer % down == 0 else "", scope="row"),
            *(
                _cell(layer, head, float(table[layer, head]), most, (layer, head) == chosen)
                for head in range(count)
            ),
            role="row",
        )
        for layer in range(layers)
    ]
    size = (
        "large" if count <= 8 else "middle" if count <= 16 else "small" if count <= 32 else "tiny"
    )
    grid = element(
        "table",
        element("thead", header, role="presentation"),
        element("tbody", *lines, role="presentation"),
        class_=f"map {size}",
        role="grid",
        aria_label="Heads: a row for each layer, a column for each head",
        aria_rowcount=layers,
        aria_colcount=count,
    )
    name = MEASURES["magnitude"][1]
    return element(
        "div",
        element("h3", "Heads"),
        _measure_choice(heads),
        _state_choice(list(heads.states)) if len(heads.states) > 1 else None,
        element("div", element("p", "layer ↓ head →", class_="axis"), grid, class_="wide map-box"),
        element(
            "p",
            element("span", "0%", class_="low"),
            element("span", class_="ramp", aria_hidden="true"),
            element("span", f"{100 * most:.0f}%", class_="high"),
            element("span", f"{name}, {state}, mean of {heads.prompts:,} prompts", class_="what"),
            class_="scale",
        ),
        element(
            "output",
            _reading(heads, chosen),
            class_="reading head-reading",
            aria_live="polite",
        ),
        class_="heads",
    )


def _cell(layer: int, head: int, value: float, most: float, chosen: bool) -> Markup:
    missing = np.isnan(value)
    strength = 0.0 if missing or not most else max(0.0, value / most)
    told = "no head" if missing else percent(value)
    return element(
        "td",
        role="gridcell",
        tabindex="0" if chosen else "-1",
        aria_label=f"layer {layer}, head {head}: {told}",
        aria_selected="true" if chosen else "false",
        class_="none" if missing else None,
        style=f"--a:{strength:.3f}",
    )


def _reading(heads: Heads, chosen: tuple[int, int]) -> str:
    layer, head = chosen
    parts = []
    for name, _, tables in measures(heads).values():
        values = [float(table[layer, head]) for table in tables.values()]
        told = [percent(one) for one in values]
        parts.append(f"{name} {' → '.join(told)}")
    return f"Layer {layer}, head {head}: {', '.join(parts)} ({heads.prompts:,} prompts)"


def _measure_choice(heads: Heads) -> Markup:
    options = [
        element(
            "label",
            element("input", type="radio", name="measure", value=key, checked=key == "magnitude"),
            element("span", name),
        )
        for key, (name, _, _) in measures(heads).items()
    ]
    return element("fieldset", element("legend", "Colour by"), *options, class_="choice scripted")


def _state_choice(states: list[str]) -> Markup:
    options = [
        element(
            "label",
            element("input", type="radio", name="state", value=name, checked=name == states[-1]),
            element("span", name),
        )
        for name in [*states, CHANGE]
    ]
    return element("fieldset", element("legend", "State"), *options, class_="choice scripted")


def _shape(heads: Heads) -> tuple[int, int]:
    layers, count = next(iter(heads.states.values())).magnitude.shape
    return layers, count


def percent(value: float) -> str:
    """A rate as this panel writes it, as the script does."""
    return "–" if np.isnan(value) else f"{100 * value:.1f}%".replace("-", "−")


def numbers(table: np.ndarray, digits: int) -> list[float | None]:
    """A table row by row, rounded, None for NaN."""
    rounded = np.round(table.astype(np.float64), digits).ravel().tolist()
    return [None if one != one else one for one in rounded]
