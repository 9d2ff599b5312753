"""The map of heads and the prompts' own text, head by head: what the template and script show.

Everything is in the page without a script, for the head that is chosen first; the script moves to
others. Letters: L layers, H heads, T tokens, K demonstrations.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

from abft_mlx.induction import Example, Heads

MEASURES = {
    "magnitude": ("magnitude", "attention on the demonstrations' labels"),
    "correctness": ("correctness", "attention on right labels minus on wrong ones"),
    "share": ("above filter", "share of prompts in which it is an induction head"),
    "sink": ("sink", "attention on the prompt's first token"),
    "weight": ("weight", "weight in the label-attention read-out, which gives the answer"),
    # On repeated random tokens, where a file has them of every state.
    "previous_token": ("previous token", "on random text: attention on the token before"),
    "duplicate_token": ("duplicate token", "on random text: attention on the same token earlier"),
    "induction": ("repetition", "on random text: attention on what followed the same token"),
}
MEANS = ("magnitude", "correctness", "share", "sink")
SIGNED = ("correctness", "weight")
STATE_NAMES = {"before": "before (base model)", "after": "after (with the adapter)"}
# Attention is kept in so many steps of each head's largest value on a prompt.
LEVELS = 255


def panel(heads: Heads) -> dict[str, Any]:
    """What the template shows, and what the script reads (``data``)."""
    tables = _tables(heads)
    states = list(heads.states)
    layers, count = tables["magnitude"][states[-1]].shape
    chosen = _first_head(heads)
    most = float(np.nanmax(np.stack(list(tables["magnitude"].values()))))
    packed = [
        {name: _packed(rows) for name, rows in example.rows.items()} for example in heads.examples
    ]
    reading = ", ".join(
        f"{MEASURES[key][0]} " + " → ".join(percent(table[chosen]) for table in by_state.values())
        for key, by_state in tables.items()
    )
    return {
        "layers": layers,
        "count": count,
        "chosen": chosen,
        "prompts": heads.prompts,
        "states": states,
        "measures": {key: MEASURES[key] for key in tables},
        "most": most,
        "values": tables["magnitude"][states[-1]].tolist(),
        "reading": f"Layer {chosen[0]}, head {chosen[1]}: {reading} ({heads.prompts:,} prompts)",
        "examples": [
            _example(heads, example, packed[n], chosen) for n, example in enumerate(heads.examples)
        ],
        "data": {
            "layers": layers,
            "heads": count,
            "prompts": heads.prompts,
            "states": states,
            "start": list(chosen),
            "signed": list(SIGNED),
            "measures": {
                key: {
                    "name": MEASURES[key][0],
                    "what": MEASURES[key][1],
                    "mean": key in MEANS,
                    "values": {state: _numbers(table, 5) for state, table in by_state.items()},
                }
                for key, by_state in tables.items()
            },
            "examples": [
                _example_data(example, packed[n]) for n, example in enumerate(heads.examples)
            ],
        },
    }


def percent(value: float) -> str:
    """A rate as this panel writes it, as the script does."""
    return "–" if np.isnan(value) else f"{100 * value:.1f}%".replace("-", "−")


def _first_head(heads: Heads) -> tuple[int, int]:
    """The head to begin with: whose correctness changed most, or that looks at labels most."""
    states = list(heads.states.values())
    table = states[0].magnitude
    if len(states) > 1:
        table = np.abs(states[-1].correctness - states[0].correctness)
    layer, head = np.unravel_index(int(np.nanargmax(table)), table.shape)
    return int(layer), int(head)


def _tables(heads: Heads) -> dict[str, dict[str, np.ndarray]]:
    """(L, H) values in every state by the measures that there are."""
    tables: dict[str, dict[str, np.ndarray]] = {}
    for key in MEASURES:
        found = {}
        for state, census in heads.states.items():
            source = census if key in MEANS or key == "weight" else census.detected
            found[state] = getattr(source, key, None)
        known = {state: table for state, table in found.items() if table is not None}
        if key == "weight" and known:
            # The state before has none: there the LM head answers.
            known = dict.fromkeys(heads.states, list(known.values())[-1])
        if len(known) == len(found):
            tables[key] = known
    return tables


def _on_labels(example: Example, rows: np.ndarray) -> dict[str, np.ndarray]:
    """(L, H) attention of rows (L, H, T) on all, on right and on wrong labels."""
    at = rows[:, :, example.label_positions].astype(np.float64)
    right, wrong = at[:, :, example.right].sum(axis=-1), at[:, :, ~example.right].sum(axis=-1)
    return {"labels": right + wrong, "right": right, "wrong": wrong}


def _packed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (L, H, T) as uint8, and what a step is worth for each head: (L, H), NaN for none."""
    wide = rows.astype(np.float64)
    # Rounded as the page will read it, so that what is drawn here and there is the same.
    scales = np.round(wide.max(axis=-1) / LEVELS, 9)
    steps = np.nan_to_num(wide) / np.where(scales > 0, scales, 1.0)[..., None]
    return np.clip(np.rint(steps), 0, LEVELS).astype(np.uint8), scales


def _example_data(
    example: Example, packed: dict[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    """What the script reads of a prompt."""
    states = {}
    for name, (steps, scales) in packed.items():
        sums = _on_labels(example, example.rows[name])
        states[name] = {
            "rows": base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode("ascii"),
            "scales": _numbers(scales, 9),
            "right": _numbers(sums["right"], 5),
            "wrong": _numbers(sums["wrong"], 5),
        }
    positions = example.label_positions.tolist()
    return {"tokens": len(example.tokens), "labels": positions, "states": states}


def _example(
    heads: Heads,
    example: Example,
    packed: dict[str, tuple[np.ndarray, np.ndarray]],
    chosen: tuple[int, int],
) -> dict[str, Any]:
    """What the template shows of a prompt, for one head."""
    values = {name: steps[chosen] * np.nan_to_num(scales[chosen])
              for name, (steps, scales) in packed.items()}  # fmt: skip
    most = max(float(row.max()) for row in values.values()) or 1.0
    sums = {name: _on_labels(example, rows) for name, rows in example.rows.items()}
    marked = dict(zip(example.label_positions.tolist(), example.right.tolist(), strict=True))
    return {
        "gold": heads.labels[example.gold],
        "demonstrations": [
            (heads.labels[label], right)
            for label, right in zip(example.demonstration_labels, example.right, strict=True)
        ],
        "sums": [
            (key, title, {name: percent(found[key][chosen]) for name, found in sums.items()})
            for key, title in (
                ("labels", "on labels"),
                ("right", "on right labels ✓"),
                ("wrong", "on wrong labels ✗"),
            )
        ],
        "states": [
            {
                "name": name,
                "title": STATE_NAMES.get(name, name),
                "tokens": [
                    (_shown(token), float(row[n]) / most, marked.get(n), percent(float(row[n])))
                    for n, token in enumerate(example.tokens)
                ],
            }
            for name, row in values.items()
        ],
    }


def _shown(token: str) -> str:
    """A token whose white space can be seen."""
    return token.replace("\t", "⇥\t").replace("\n", "⏎\n") or "∅"


def _numbers(table: np.ndarray, digits: int) -> list[float | None]:
    """A table row by row, rounded, None for NaN."""
    rounded = np.round(table.astype(np.float64), digits).ravel().tolist()
    return [None if np.isnan(value) else value for value in rounded]
