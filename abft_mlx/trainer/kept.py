"""Hidden states below what trains, computed once for each prompt and kept from update to update.

What is kept depends on a prompt's tokens alone, each prompt is computed alone and without padding,
and files hold the same bits as memory. So it makes no difference to a run, bit for bit, which
prompts are kept where, or are computed again.

Letters in shapes: B prompts, T tokens.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx.objective import abft_terms
from abft_mlx.prompts import NO_TOKEN, PromptBatch
from abft_mlx.trainer.below import run_below
from abft_mlx.trainer.plan import MicroBatch

# Left free on the disk of the temporary folder.
SPARE_DISK_BYTES = 2**30
_NAME = "hidden"


class Store:
    """Arrays by name: in memory up to a budget, and then in files of a temporary folder.

    Nothing is ever moved: an update's prompts are drawn in a new order in every pass, so each is
    as likely to be wanted next as any other.

    Args:
        budget_bytes: how much may be in memory.
        spare_bytes: how much of the disk must stay free.

    Attributes:
        memory_bytes: what is in memory.
        disk_bytes: what is in files.
        folder: the temporary folder, while there is one.
    """

    def __init__(self, budget_bytes: int, spare_bytes: int = SPARE_DISK_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self.spare_bytes = spare_bytes
        self.memory_bytes = self.disk_bytes = 0
        self.folder: Path | None = None
        self._arrays: dict[bytes, mx.array] = {}
        self._files: dict[bytes, Path] = {}
        self._written = 0
        self._disk_takes_more = True

    def get(self, key: bytes) -> mx.array | None:
        """The array of this name, or None, also where somebody removed its file."""
        if key in self._arrays:
            return self._arrays[key]
        path = self._files.get(key)
        if path is None:
            return None
        return mx.load(str(path))[_NAME] if path.is_file() else None

    def put(self, key: bytes, array: mx.array) -> None:
        """Keep an array that owns its memory, where there is room."""
        if self.memory_bytes + array.nbytes <= self.budget_bytes:
            self._arrays[key] = array
            self.memory_bytes += array.nbytes
        elif self._disk_takes_more:
            self._spill(key, array)

    def _spill(self, key: bytes, array: mx.array) -> None:
        """Write an array into the temporary folder, where the disk has room."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="abft-mlx-hidden-"))
        if shutil.disk_usage(self.folder).free - array.nbytes < self.spare_bytes:
            self._disk_takes_more = False
            return
        path = self.folder / f"{self._written}.safetensors"
        try:
            mx.save_safetensors(str(path), {_NAME: array})
        except RuntimeError:
            # MLX's word for a disk or quota that is full. What is not kept is computed again.
            path.unlink(missing_ok=True)
            self._disk_takes_more = False
            return
        self._written += 1
        if key not in self._files:
            self.disk_bytes += array.nbytes
        self._files[key] = path

    def counts(self) -> dict[str, int]:
        """How many arrays and bytes are where."""
        return {
            "memory_prompts": len(self._arrays),
            "memory_bytes": self.memory_bytes,
            "disk_prompts": len(self._files),
            "disk_bytes": self.disk_bytes,
        }

    def close(self) -> None:
        """Let go of everything and remove the folder; nothing may be kept after that."""
        self._arrays.clear()
        self._files.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Kept:
    """Gives micro-batches what their prompts have below the first block that trains.

    Args:
        model: a loaded model with adapters attached.
        first: the first block that trains, from :func:`abft_mlx.trainer.below.boundary`.
        budget_bytes: of hidden states in memory.
        counted: whether heads of layers below have a part in equation 1.
        use_filter: whether they must then pass the induction-head filter.
        answered: whether answers follow the prompts (:meth:`MicroBatch.answered`).

    Attributes:
        first: the block whose input is kept.
        store: where it is.
        computed: how often a prompt was computed.
    """

    def __init__(
        self,
        model: nn.Module,
        first: int,
        budget_bytes: int,
        *,
        counted: bool,
        use_filter: bool = True,
        answered: bool = False,
    ) -> None:
        self.model = model
        self._answered = answered
        self.first = first
        self.store = Store(budget_bytes)
        self.computed = 0
        self._counted = counted
        self._use_filter = use_filter
        self._seen: set[bytes] = set()
        self._terms: dict[bytes, np.ndarray] = {}

    def arrays(self, micro_batch: MicroBatch) -> dict[str, mx.array]:
        """A micro-batch's arrays, with what lies below the first block that trains.

        Returns:
            :meth:`MicroBatch.arrays` with ``hidden``, (B, T, width) hidden states that go into the
            first block that trains, and, where the layers below count, ``below``, (B, 3) float32:
            their part in each prompt's punish term, reward term and kept heads.
        """
        batch = micro_batch.batch
        keys = [self._key(batch, row) for row in range(len(batch))]
        found: dict[bytes, mx.array] = {}
        for row, key in enumerate(keys):
            if key not in found:
                known = self.store.get(key)
                hidden = self._compute(key, batch, row) if known is None else known
                found[key] = _padded(hidden, batch.tokens.shape[1])
        arrays = micro_batch.arrays()
        arrays["hidden"] = mx.stack([found[key] for key in keys])
        if self._counted:
            arrays["below"] = mx.array(np.stack([self._terms[key] for key in keys]))
        mx.eval(arrays["hidden"])
        return arrays

    def _compute(self, key: bytes, batch: PromptBatch, row: int) -> mx.array:
        """One prompt's (T, width) hidden states, and its terms if they are wanted."""
        one = slice(row, row + 1)
        last = mx.array(batch.last[one])
        tokens = mx.array(self._tokens(batch, row)[None])
        hidden, rows = run_below(self.model, self.first, tokens, last)
        hidden = hidden[0]
        if self._counted and key not in self._terms:
            terms = abft_terms(
                rows,
                mx.array(batch.label_positions[one]),
                mx.array(batch.demonstration_labels[one]),
                mx.array(batch.gold[one]),
                last,
                punish_weight=0.0,
                reward_weight=0.0,
                use_filter=self._use_filter,
            )
            self._terms[key] = np.array(mx.stack(terms[1:]))
        mx.eval(hidden)
        self.computed += 1
        self._seen.add(key)
        self.store.put(key, hidden)
        return hidden

    def _tokens(self, batch: PromptBatch, row: int) -> np.ndarray:
        """A prompt's tokens, and those of the answer behind it if there is one."""
        answer = int((batch.target[row] != NO_TOKEN).sum()) if self._answered else 1
        return batch.tokens[row, : batch.last[row] + answer]

    def _key(self, batch: PromptBatch, row: int) -> bytes:
        """All of a prompt that what is kept depends on."""
        parts = (
            batch.last[row],
            self._tokens(batch, row),
            batch.label_positions[row],
            batch.demonstration_labels[row],
            batch.gold[row],
        )
        return b"/".join(part.tobytes() for part in parts)

    def counts(self) -> dict[str, Any]:
        """What is kept where, and how often a prompt that had been computed was so again."""
        return {
            "below_block": self.first,
            **self.store.counts(),
            "recomputed": self.computed - len(self._seen),
        }

    def close(self) -> None:
        """Let go of everything."""
        self.store.close()


def _padded(hidden: mx.array, width: int) -> mx.array:
    """(T, width of the model) to a longer T; no position looks at what lies behind it.

    Behind a prompt stands its last position again: zeros are no hidden states, and not every norm
    is a number there.
    """
    more = width - hidden.shape[0]
    if not more:
        return hidden
    return mx.concatenate([hidden, mx.broadcast_to(hidden[-1:], (more, hidden.shape[1]))])
