"""What was seen of a model's heads: ``heads.npz`` of a run folder, a CSV table, two notions.

The file is a NumPy archive without pickled objects. Letters: L layers, H query heads, T tokens,
K demonstrations.
"""

from __future__ import annotations

import csv
import io
import json
import math
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
COLUMNS = ("state", "layer", "head", *CENSUS, *DETECTED, "weight")


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
        states[name] = state.detected and {
            size: getattr(state.detected, size) for size in ("sequences", "repeated_tokens")
        }
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
        return _heads(about, arrays)
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
    """The contents of a file, whose arrays are of one model and lie within prompts and classes."""
    states, labels = {}, tuple(map(str, about["labels"]))
    for name, sizes in about["states"].items():
        detected = None
        if sizes:
            previous, duplicate, induction = (arrays[f"{name}.detected.{p}"] for p in DETECTED)
            counts = sizes["sequences"], sizes["repeated_tokens"]
            detected = Detected(previous, duplicate, induction, *counts)
        census = {part: arrays[f"{name}.{part}"] for part in CENSUS}
        states[name] = HeadState(**census, detected=detected, weight=arrays.get(f"{name}.weight"))
    (shape,) = {table.shape for state in states.values() for table in state.tables.values()}
    fits = len(shape) == 2
    examples = []
    for n, entry in enumerate(about["examples"]):
        tokens, gold = tuple(map(str, entry["tokens"])), int(entry["gold"])
        positions = arrays[f"example{n}.label_positions"]
        classes = arrays[f"example{n}.demonstration_labels"]
        rows = {name: arrays[f"example{n}.{name}"].astype(np.float32) for name in entry["states"]}
        fits = (
            fits
            and set(rows) <= set(states)
            and {table.shape for table in rows.values()} == {(*shape, len(tokens))}
            and positions.shape == classes.shape == (len(positions),)
            and all(array.dtype.kind in "iu" for array in (positions, classes))
            and all(0 <= position < len(tokens) for position in positions)
            and all(0 <= label < len(labels) for label in (*classes, gold))
        )
        examples.append(Example(tokens, positions, classes, gold, rows))
    if not fits:
        raise ValueError("its arrays do not fit together")
    return Heads(states, tuple(examples), labels, int(about["prompts"]), dict(about["facts"]))


def write_csv(path: Path, heads: Heads) -> None:
    """Write one row for each head in each state, layers without heads left out.

    What is not known of a head, detectors' scores or weights, is empty.

    Raises:
        OutputError: the folder cannot be written.
        RunError: the disk is full.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, state in heads.states.items():
        for layer, head in np.argwhere(~np.isnan(state.magnitude)).tolist():
            values = {part: float(table[layer, head]) for part, table in state.tables.items()}
            writer.writerow({"state": name, "layer": layer, "head": head} | values)
    files.write_text(path, text.getvalue())


@dataclass(frozen=True)
class Agreement:
    """Whether heads that look at labels are those that continue repeated random tokens.

    Attributes:
        rank_correlation: Spearman's, over all heads, of magnitude and induction score, in -1..1;
            NaN where one of them is the same in all heads.
        count: n, heads that pass the filter in at least half of the prompts.
        shared: of the n heads of highest induction score, how many are among these.
        by_chance: how many would be if the scores were drawn by lot, n² / all.
    """

    rank_correlation: float
    count: int
    shared: int
    by_chance: float


def agreement(state: HeadState) -> Agreement | None:
    """Compare the paper's notion of an induction head with the classic one.

    Returns:
        None where no detectors were asked for.
    """
    if state.detected is None:
        return None
    known = ~np.isnan(state.magnitude)
    magnitude, induction = state.magnitude[known], state.detected.induction[known]
    ranks: list[np.ndarray] = []
    for values in (magnitude, induction):  # equal values share the mean of their ranks
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        mean_ranks: np.ndarray = np.cumsum(counts) - (counts + 1) / 2
        ranks.append(mean_ranks[where])
    constant = any(np.ptp(rank) == 0 for rank in ranks)
    ours = state.share[known] >= 0.5
    count = int(ours.sum())
    best = np.argsort(-induction, kind="stable")[:count]
    return Agreement(
        rank_correlation=math.nan if constant else float(np.corrcoef(ranks)[0, 1]),
        count=count,
        shared=int(ours[best].sum()),
        by_chance=count**2 / len(ours),
    )
