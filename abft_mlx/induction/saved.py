"""What was seen of a model's heads, and the file that keeps it: ``heads.npz`` of a run folder.

The file is a NumPy archive without pickled objects. Letters: L layers, H query heads, T tokens,
K demonstrations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx import files
from abft_mlx.errors import OutputError
from abft_mlx.induction.census import HeadCensus
from abft_mlx.induction.detectors import Detected

SCHEMA = 1
HEADS_FILE = "heads.npz"
CENSUS = ("magnitude", "correctness", "share", "sink")
DETECTED = ("previous_token", "duplicate_token", "induction")


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
    def tables(self) -> dict[str, np.ndarray]:
        """Name to array of all that is known: the census, detectors' scores, head weights."""
        tables = {part: getattr(self, part) for part in CENSUS}
        if self.detected is not None:
            tables |= {part: getattr(self.detected, part) for part in DETECTED}
        return tables if self.weight is None else tables | {"weight": self.weight}

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
        for part, table in state.tables.items():
            arrays[f"{name}.detected.{part}" if part in DETECTED else f"{name}.{part}"] = table
        states[name] = None
        if state.detected is not None:
            sizes = ("sequences", "repeated_tokens")
            states[name] = {size: getattr(state.detected, size) for size in sizes}
    examples = []
    for n, example in enumerate(heads.examples):
        tokens, names = list(example.tokens), list(example.rows)
        examples.append({"tokens": tokens, "gold": example.gold, "states": names})
        for part in ("label_positions", "demonstration_labels"):
            arrays[f"example{n}.{part}"] = np.asarray(getattr(example, part), dtype=np.int32)
        for name, rows in example.rows.items():
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
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = files.parse_json(arrays["about"].tobytes())
        problem = files.schema_problem(about["schema"], SCHEMA, "make it again: abft-mlx heads")
        if problem:
            raise OutputError(f"{path}: {problem}")
        heads = _heads(about, arrays)
        if not _fits_together(heads):
            raise ValueError("its arrays do not fit together")
        return heads
    except FileNotFoundError:
        raise OutputError(f"{path}: there is no such file; abft-mlx heads makes it") from None
    except OutputError:
        raise
    except Exception as error:  # of a damaged file NumPy, zipfile and tokenize raise anything
        reason = " ".join(str(error).split())
        raise OutputError(
            f"{path}: is no file of heads ({reason}); abft-mlx heads makes one"
        ) from error


def _heads(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Heads:
    """The contents of a file."""
    states = {}
    for name, sizes in about["states"].items():
        detected = None
        if sizes is not None:
            previous, duplicate, induction = (arrays[f"{name}.detected.{p}"] for p in DETECTED)
            counts = (sizes["sequences"], sizes["repeated_tokens"])
            detected = Detected(previous, duplicate, induction, *counts)
        census = {part: arrays[f"{name}.{part}"] for part in CENSUS}
        states[name] = HeadState(**census, detected=detected, weight=arrays.get(f"{name}.weight"))
    examples = tuple(
        Example(
            tokens=tuple(entry["tokens"]),
            label_positions=arrays[f"example{n}.label_positions"],
            demonstration_labels=arrays[f"example{n}.demonstration_labels"],
            gold=int(entry["gold"]),
            rows={
                name: arrays[f"example{n}.{name}"].astype(np.float32) for name in entry["states"]
            },
        )
        for n, entry in enumerate(about["examples"])
    )
    facts = dict(about["facts"])
    return Heads(states, examples, tuple(about["labels"]), int(about["prompts"]), facts)


def _fits_together(heads: Heads) -> bool:
    """Whether all arrays are of one model and lie within their prompts and classes."""
    shapes = {table.shape for state in heads.states.values() for table in state.tables.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        return False
    (shape,) = shapes
    for example in heads.examples:
        positions, labels = example.label_positions, example.demonstration_labels
        if not (
            set(example.rows) <= set(heads.states)
            and {rows.shape for rows in example.rows.values()} == {(*shape, len(example.tokens))}
            and positions.shape == labels.shape == (len(positions),)
            and positions.dtype.kind + labels.dtype.kind in ("ii", "uu", "iu", "ui")
            and all(0 <= position < len(example.tokens) for position in positions)
            and all(0 <= label < len(heads.labels) for label in (*labels, example.gold))
        ):
            return False
    texts = [*heads.labels, *(token for example in heads.examples for token in example.tokens)]
    return all(isinstance(text, str) for text in texts)
