"""What was seen of a model's heads, and the file that keeps it: ``heads.npz`` of a run folder.

The file is a NumPy archive without pickled objects. Letters: L layers, H query heads, T tokens,
K demonstrations.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx import files
from abft_mlx.errors import OutputError
from abft_mlx.induction import archives
from abft_mlx.induction.census import HeadCensus
from abft_mlx.induction.detectors import Detected

SCHEMA = 1
HEADS_FILE = "heads.npz"
CENSUS = ("magnitude", "correctness", "share", "sink")
DETECTED = ("previous_token", "duplicate_token", "induction")
_BROKEN = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
    zipfile.BadZipFile, EOFError,
)  # fmt: skip
"""What reading a file of another kind ends in."""


@dataclass(frozen=True)
class HeadState:
    """The census of one state of a model; arrays (L, H) float64, NaN for layers without heads.

    Attributes:
        magnitude: mean attention mass on the label positions.
        correctness: mean mass on labels equal to the gold one minus mass on the others.
        share: share of prompts in which the head passes the filter.
        sink: mean attention on the prompt's first token.
        detected: the classic detectors' scores, where they were asked for.
        weight: of each head in the read-out, where the state answers from it.
    """

    magnitude: np.ndarray
    correctness: np.ndarray
    share: np.ndarray
    sink: np.ndarray
    detected: Detected | None = None
    weight: np.ndarray | None = None

    @classmethod
    def of(cls, census: HeadCensus, detected: Detected | None = None) -> HeadState:
        """What a census came to."""
        return cls(census.magnitude, census.correctness, census.share, census.sink, detected)

    @property
    def on_gold(self) -> np.ndarray:
        """(L, H) mean attention mass on the labels that equal the gold one."""
        # Magnitude is right plus wrong, correctness right less wrong.
        return (self.magnitude + self.correctness) / 2

    @property
    def heads_per_prompt(self) -> float:
        """Mean number of induction heads in a prompt."""
        return float(np.nansum(self.share))


@dataclass(frozen=True)
class Example:
    """One prompt, and every head's last row in every state.

    Attributes:
        tokens: T texts, which put together are the prompt.
        label_positions: (K,) of the demonstrations' label tokens.
        demonstration_labels: (K,) class numbers.
        gold: the query's class number.
        rows: for each state's name (L, H, T) float32 patterns of the last position, NaN for layers
            without heads.
    """

    tokens: tuple[str, ...]
    label_positions: np.ndarray
    demonstration_labels: np.ndarray
    gold: int
    rows: Mapping[str, np.ndarray]

    @property
    def right(self) -> np.ndarray:
        """(K,) bool, True for the demonstrations whose label is the gold one."""
        return np.asarray(self.demonstration_labels) == self.gold


@dataclass(frozen=True)
class Heads:
    """What was seen of a model's heads.

    Attributes:
        states: name to census, in order: ``before`` and, where there is an adapter, ``after``.
        examples: a few prompts with their rows; may be empty.
        labels: names of the classes.
        prompts: prompts that the census looked at.
        facts: what else is known, as JSON: ``model``, ``adapter``, ``data``, ``k``, ``seed``.
    """

    states: Mapping[str, HeadState]
    examples: tuple[Example, ...]
    labels: tuple[str, ...]
    prompts: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_heads(path: Path, heads: Heads) -> None:
    """Write what was seen; rows are kept as float16.

    Raises:
        OutputError: the folder cannot be written.
        RunError: the disk is full.
    """
    arrays: dict[str, np.ndarray] = {}
    states: dict[str, Any] = {}
    for name, state in heads.states.items():
        states[name] = None
        for part in CENSUS:
            arrays[f"{name}.{part}"] = getattr(state, part)
        if state.weight is not None:
            arrays[f"{name}.weight"] = state.weight
        if state.detected is not None:
            found = asdict(state.detected)
            for part in DETECTED:
                arrays[f"{name}.detected.{part}"] = found.pop(part)
            states[name] = found
    examples = []
    for n, one in enumerate(heads.examples):
        examples.append({"tokens": list(one.tokens), "gold": one.gold, "states": list(one.rows)})
        arrays[f"example{n}.label_positions"] = np.asarray(one.label_positions, dtype=np.int32)
        arrays[f"example{n}.demonstration_labels"] = np.asarray(
            one.demonstration_labels, dtype=np.int32
        )
        for name, rows in one.rows.items():
            arrays[f"example{n}.{name}"] = rows.astype(np.float16)
    about = {
        "schema": SCHEMA,
        "prompts": heads.prompts,
        "labels": list(heads.labels),
        "facts": dict(heads.facts),
        "states": states,
        "examples": examples,
    }
    # Text as bytes: a string array drops zeros at its end.
    text = json.dumps(about, ensure_ascii=False, allow_nan=False).encode()
    arrays["about"] = np.frombuffer(text, dtype=np.uint8)
    with files.replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def read_heads(path: str | Path) -> Heads:
    """Read what :func:`write_heads` wrote.

    Raises:
        OutputError: there is no such file, it is another file, or it is of another version.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            arrays = archives.arrays(archive)
        about = files.parse_json(arrays["about"].tobytes())
        problem = files.schema_problem(about["schema"], SCHEMA, "make it again: abft-mlx heads")
        if problem:
            raise OutputError(f"{path}: {problem}")
        if not isinstance(about["facts"], dict):
            raise ValueError("its facts are no table")
        heads = _heads(about, arrays)
        if not _fits_together(heads):
            raise OutputError(
                f"{path}: its arrays do not fit together; make it again with: abft-mlx heads"
            )
        return heads
    except FileNotFoundError:
        raise OutputError(f"{path}: there is no such file; abft-mlx heads makes it") from None
    except _BROKEN as error:
        raise OutputError(f"{path}: is no file of heads ({error}); abft-mlx heads makes one") from (
            error
        )


def _heads(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Heads:
    states = {}
    for name, found in about["states"].items():
        detected = None
        if found is not None:
            previous, duplicate, induction = (arrays[f"{name}.detected.{one}"] for one in DETECTED)
            detected = Detected(
                previous, duplicate, induction, found["sequences"], found["repeated_tokens"]
            )
        states[name] = HeadState(
            **{part: arrays[f"{name}.{part}"] for part in CENSUS},
            detected=detected,
            weight=arrays.get(f"{name}.weight"),
        )
    examples = tuple(
        Example(
            tokens=tuple(one["tokens"]),
            label_positions=arrays[f"example{n}.label_positions"],
            demonstration_labels=arrays[f"example{n}.demonstration_labels"],
            gold=int(one["gold"]),
            rows={name: arrays[f"example{n}.{name}"].astype(np.float32) for name in one["states"]},
        )
        for n, one in enumerate(about["examples"])
    )
    return Heads(states, examples, tuple(about["labels"]), int(about["prompts"]), about["facts"])


def _fits_together(heads: Heads) -> bool:
    """Whether all arrays are of one model and lie within their prompts and classes."""
    shapes = {
        getattr(state, part).shape for state in heads.states.values() for part in CENSUS
    } | {
        state.weight.shape for state in heads.states.values() if state.weight is not None
    } | {
        getattr(state.detected, part).shape
        for state in heads.states.values()
        if state.detected is not None
        for part in DETECTED
    }  # fmt: skip
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        return False
    (shape,) = shapes
    labels = len(heads.labels)
    return all(isinstance(label, str) for label in heads.labels) and all(
        set(one.rows) <= set(heads.states)
        and {rows.shape for rows in one.rows.values()} == {(*shape, len(one.tokens))}
        and one.label_positions.shape == one.demonstration_labels.shape
        and one.label_positions.ndim == 1
        and {one.label_positions.dtype.kind, one.demonstration_labels.dtype.kind} <= set("iu")
        and all(isinstance(token, str) for token in one.tokens)
        and all(0 <= position < len(one.tokens) for position in one.label_positions)
        and all(0 <= label < labels for label in (*one.demonstration_labels, one.gold))
        for one in heads.examples
    )
