"""heads.npz from elsewhere: what its arrays must agree in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_heads_saved import TOKENS, heads
from test_window_choice import census

from abft_mlx.errors import OutputError
from abft_mlx.induction import Detected, HeadState, read_heads, write_heads

Change = Callable[[dict[str, Any]], Any]
"""Changes the arrays of a file, by name, or what ``about`` says of them."""


def rewritten(path: Path, change: Change) -> None:
    """A file of heads with its arrays, or what it says about them, changed."""
    write_heads(path, heads())
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["about"] = json.loads(arrays["about"].tobytes())
    change(arrays)
    arrays["about"] = np.frombuffer(json.dumps(arrays["about"]).encode(), dtype=np.uint8)
    np.savez(path, **arrays)


def refused(path: Path) -> str:
    with pytest.raises(OutputError) as caught:
        read_heads(path)
    return str(caught.value)


def test_a_file_says_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    write_heads(path, heads())
    with np.load(path) as archive:
        arrays = dict(archive)
    text = arrays.pop("about")
    assert text.dtype == np.uint8
    assert "ja 日本".encode() in text.tobytes()
    assert json.loads(text.tobytes()) == {
        "schema": 1,
        "prompts": 12,
        "labels": ["no", "ja 日本"],
        "facts": {"model": "m", "adapter": None, "k": 2},
        "states": {"x": {"sequences": 16, "repeated_tokens": 9}, "y": None},
        "examples": [{"tokens": list(TOKENS), "gold": 1, "states": ["x", "y"]}],
    }
    parts = ("magnitude", "correctness", "share", "sink")
    found = ("previous_token", "duplicate_token", "induction")
    assert set(arrays) == {
        *(f"{name}.{part}" for name in "xy" for part in parts),
        *(f"x.detected.{part}" for part in found),
        *(f"example0.{name}" for name in ("x", "y", "label_positions", "demonstration_labels")),
    }
    for name in ("label_positions", "demonstration_labels"):
        assert arrays[f"example0.{name}"].dtype == np.int32
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_heads(path, replace(heads(), facts={"k": float("nan")}))


def test_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    rewritten(path, lambda made: made["about"].update(facts=[1]))
    assert refused(path).startswith(f"{path}: is no file of heads (")
    rewritten(path, lambda made: made["about"].update(schema=7))
    assert "is of schema 7 and this abft-mlx reads 1" in refused(path)
    rewritten(path, lambda made: made["about"].update(schema=None))
    assert read_heads(str(path)).prompts == 12


def set_to(name: str, value: Any) -> Change:
    return lambda made: made.update({name: np.asarray(value)})


def flat(arrays: dict[str, Any]) -> None:
    for name in arrays:
        if name[:2] in ("x.", "y."):
            arrays[name] = np.zeros(12)


def of_example(**changes: Any) -> Change:
    return lambda made: made["about"]["examples"][0].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        set_to("y.share", np.zeros((3, 5))),
        set_to("x.detected.previous_token", np.zeros((2, 4))),
        flat,
        lambda made: made["about"].update(labels=["no", 3]),
        lambda made: made["about"].update(labels=["no"]),
        lambda made: made["about"]["states"].pop("y"),
        set_to("example0.y", np.zeros((3, 5, 10))),
        of_example(tokens=["a"] * 9),
        of_example(tokens=["a"] * 9 + [7]),
        of_example(gold=2),
        set_to("example0.label_positions", [2, 8, 9]),
        set_to("example0.label_positions", [2.0, 8.0]),
        set_to("example0.label_positions", [2, 10]),
        set_to("example0.demonstration_labels", [2, 0]),
    ],
)
def test_arrays_that_do_not_fit_together(change: Change, tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    rewritten(path, change)
    assert "(its arrays do not fit together)" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        set_to("example0.label_positions", [0, 9]),
        set_to("example0.demonstration_labels", [0, 0]),
        set_to("example0.label_positions", np.array([2, 8], dtype=np.uint16)),
        of_example(gold=0),
        of_example(states=["x"]),
        lambda made: made["about"].update(examples=[]),
        lambda made: made["about"]["states"].update(x=None),
    ],
)
def test_arrays_that_do_fit_together(change: Change, tmp_path: Path) -> None:
    path = tmp_path / "heads.npz"
    rewritten(path, change)
    assert list(read_heads(path).states) == ["x", "y"]


def test_a_state_is_of_its_census() -> None:
    seen = census(1, None, 4)
    found = Detected(*np.zeros((3, 3, 4)), sequences=1, repeated_tokens=3)
    state = HeadState.of(seen, found)
    for part in ("magnitude", "correctness", "share", "sink"):
        np.testing.assert_array_equal(getattr(state, part), getattr(seen, part))
    assert state.detected is found
    assert HeadState.of(seen).detected is None
    assert state.heads_per_prompt == 5.0
    # Every label is the gold one here.
    np.testing.assert_array_equal(state.on_gold, state.magnitude)
