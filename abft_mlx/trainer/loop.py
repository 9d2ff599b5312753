"""The training loop: updates, the PID law, validation, checkpoints."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from abft_mlx import adapters, prefix, runtime
from abft_mlx.errors import OutputError, RecipeError, RunError, StoppedError
from abft_mlx.events import MEASURES, Events, Update
from abft_mlx.objective import PunishController
from abft_mlx.prompts import Prompt
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import Recipe
from abft_mlx.stopping import Stop
from abft_mlx.trainer import batches, checkpoint, memory
from abft_mlx.trainer.run_folder import RunFolder
from abft_mlx.trainer.step import Step, Totals


class DivergedError(RunError):
    """A run stopped because too many updates in a row were not finite.

    The model is as its last finite update left it.
    """


@dataclass
class Progress:
    """What a run has come to; plain values that a checkpoint keeps.

    Attributes:
        updates: optimizer updates done.
        tokens: prompt tokens seen, padding left out.
        seconds: wall-clock seconds spent in updates, interruptions left out.
        validations: (updates done, accuracy) pairs, the first before any update.
        best_update: update with the best validation accuracy so far, or None.
        skipped: of the updates, those left out because they were not finite.
        skipped_in_a_row: of these, the ones since the last update that was applied.
    """

    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validations: list[tuple[int, float]] = field(default_factory=list)
    best_update: int | None = None
    best_accuracy: float = -1.0
    peak_memory_bytes: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Trainer:
    """Trains a model that has adapters attached, by the recipe's objective.

    Several ranks make the same updates: each takes its share of an update's prompts, and gradients
    and head counts are those of all. The first rank alone writes to the folder.

    Args:
        model: a loaded model, adapters attached, everything else frozen.
        prompts: the training prompts, all with the same number of demonstrations.
        recipe: a resolved recipe; its objective and training sections are used.
        folder: where metrics and checkpoints go, or None to write nothing.
        validate: gives the model's accuracy in 0..1 as it is now, on all ranks the same number;
            called as ``training.validate_every`` says.
        events: who hears of every update.
        fingerprint: what is trained on what; a checkpoint with another one is refused.
        made_with: what the fingerprint stands for, by name, so that a refusal can name it.
        stop: what may ask the run to end after an update.
        ranks: the processes that train together; this one alone if None.

    Raises:
        RecipeError: an update has fewer groups of prompts than there are ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        recipe: Recipe,
        *,
        folder: RunFolder | None = None,
        validate: Callable[[], float] | None = None,
        events: Events | None = None,
        fingerprint: str = "",
        made_with: dict[str, Any] | None = None,
        stop: Stop | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        objective, training = recipe.objective, recipe.training
        self.model = model
        self.prompts = prompts
        self.recipe = recipe
        self.folder = folder
        self.validate = validate if training.validate_every else None
        self.events = events or Events()
        self.fingerprint = fingerprint
        self.made_with = made_with or {}
        self.stop = stop or Stop()
        self.ranks = ranks or Ranks()
        self.progress = Progress()
        self.best: Any = None
        self._saved = False
        self._together = training.together
        groups = training.prompts_per_update // self._together
        if groups < self.ranks.size:
            raise RecipeError(
                f"training.prompts_per_update {training.prompts_per_update}: {groups} groups of "
                f"prompts cannot be shared by {self.ranks.size} processes; start at most {groups}"
            )
        assert training.learning_rate is not None, "the recipe must be resolved"
        # Of the other objectives equation 1 is only measured: both its weights are 0.
        supervised = objective.kind == "abft"
        self.reward_weight = objective.reward if supervised else 0.0
        self.controller = PunishController(
            objective.punish if supervised else 0.0,
            enabled=objective.pid and supervised,
            cp=objective.cp,
            ci=objective.ci,
            cd=objective.cd,
        )
        # The paper's Adam corrects its bias; MLX's does so only when asked.
        self.optimizer = optim.Adam(training.learning_rate, bias_correction=True)
        # The first pass over all groups, as far as the updates come.
        count = len(prompts) // self._together
        seen = max(1, min(count, training.updates * groups))
        self._seen = sorted(batches.update_rows(count, seen, 0, training.seed))
        used = self._of_groups(self._seen)
        self.step = Step(
            model,
            self.optimizer,
            reward_weight=self.reward_weight,
            use_filter=objective.filter,
            only_trained=objective.layers == "trained",
            objective=objective.kind,
            lm_head=objective.lm_head if objective.kind == "read_out" else 0.0,
            together=training.together,
            classes=1 + max(max((prompt.gold, *prompt.demonstration_labels)) for prompt in used),
            checkpointing=training.gradient_checkpointing,
            max_gradient_norm=training.max_gradient_norm,
            ranks=self.ranks,
        )
        self._shareable = training.together > 1 and prefix.shareable(model)
        self.backoff = memory.Backoff(model, recipe, max(len(p.token_ids) for p in used))

    @property
    def rows(self) -> int:
        """Prompts of a micro-batch."""
        return self.backoff.rows

    def run(self, *, resume: bool = False) -> Progress:
        """Train from the start, or from the folder's checkpoint, to the last update.

        Where validations were asked for and ``training.keep_best`` is set, the model ends with the
        parameters of the best one.

        Raises:
            DivergedError: the loss stopped being finite.
            RunError: memory does not suffice, or a rank is gone.
            UsageError: the ranks were not started alike, or there is nothing to resume, or it
                belongs to another run.
            StoppedError: it was asked to end, and has saved a checkpoint.
        """
        runtime.reset_peak_memory()
        if resume:
            self._restore()
        # Never validate before this: ranks that differ may not validate alike.
        self.ranks.agree(
            f"{self.fingerprint} {self.progress.updates}",
            "recipe, model, data, version or checkpoint",
        )
        if not resume:
            self._validate()
        adapters.train_mode(self.model)
        try:
            self.backoff.measure(self._peak_bytes)
            while self.progress.updates < self.recipe.training.updates:
                with self.stop.deferred():
                    self._update()
                    self._stop_if_asked()
        except DivergedError:
            self._take_best()
            raise
        finally:
            adapters.train_mode(self.model, False)
        self._take_best()
        return self.progress

    def _update(self) -> None:
        """Train on the next prompts, write the line of metrics, validate and save where due."""
        start = time.perf_counter()
        progress, training = self.progress, self.recipe.training
        punish_weight = self.controller.punish_weight
        totals = self._train(punish_weight)
        seconds = time.perf_counter() - start
        if totals.finite:
            self.controller.update(totals.induction_heads)
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        progress.updates += 1
        progress.tokens += totals.tokens
        progress.seconds += seconds
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, runtime.peak_memory_bytes())
        diverged = progress.skipped_in_a_row >= min(training.non_finite_updates, training.updates)
        validates = self.validate is not None and self._due(training.validate_every)
        update = Update(
            step=progress.updates,
            seen_examples=progress.updates * training.prompts_per_update,
            **{name: getattr(totals, name) if totals.finite else None for name in MEASURES},
            A=punish_weight,
            B=self.reward_weight,
            learning_rate=float(self.optimizer.learning_rate.item()),
            tokens=totals.tokens,
            seconds=seconds,
            peak_memory_bytes=progress.peak_memory_bytes,
            validation_accuracy=self._validate() if validates and not diverged else None,
            note=self.backoff.take_note(),
            skipped=None if totals.finite else f"{totals}: not both finite",
        )
        if self.folder is not None and self.ranks.first:
            self.folder.add_metrics(update)
            self._saved = not diverged and self._due(training.checkpoint_every)
            if self._saved:
                self._save(self.folder)
        self.events.update(update)
        if diverged:
            raise self._diverged(totals)

    def _train(self, punish_weight: float) -> Totals:
        """One optimizer step on this rank's share of the next prompts."""
        training, together = self.recipe.training, self._together
        groups = batches.update_rows(
            len(self.prompts) // together,
            training.prompts_per_update // together,
            self.progress.updates,
            training.seed,
        )
        if self.ranks.size > 1:
            lengths = [len(self.prompts[group * together].token_ids) for group in groups]
            groups = batches.rank_share(groups, lengths, self.ranks.rank, self.ranks.size)
        prompts = self._of_groups(groups)
        while True:
            # Dropout's key follows from seed, update and rank, so resuming needs no random state.
            key = (self.progress.updates << 32) | (training.seed & 0xFFFFFFFF)
            mx.random.seed(key ^ (self.ranks.rank << 56))
            micro_batches = self._cut(prompts)
            try:
                self.step.accumulate(micro_batches, punish_weight)
                break
            except (RuntimeError, MemoryError) as error:
                why = memory.message(error)
            # Only now are the arrays gone that the exception's frames held.
            runtime.release_memory()
            self.backoff.halve(min(self.rows, len(prompts)), why)
        return self.step.apply(micro_batches)

    def _of_groups(self, groups: Sequence[int]) -> list[Prompt]:
        """The prompts of some groups, each of which shares its demonstrations."""
        m = self._together
        return [self.prompts[row] for group in groups for row in range(group * m, group * m + m)]

    def _cut(self, prompts: Sequence[Prompt]) -> list[batches.MicroBatch]:
        """The prompts in micro-batches."""
        few_shapes = self._together == 1 or self.step.compiled
        return batches.micro_batches(
            prompts,
            self.rows,
            together=self._together,
            bucket_tokens=batches.BUCKET_TOKENS if few_shapes else 1,
            share=self._shareable,
        )

    def _peak_bytes(self, rows: int) -> int:
        """The peak of memory of the gradients of so many of the longest prompts."""
        together = self._together
        longest = sorted(self._seen, key=lambda n: -len(self.prompts[n * together].token_ids))
        micro_batches = self._cut(self._of_groups(longest[: rows // together]))
        before = runtime.peak_memory_bytes()
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, before)
        return memory.peak_bytes(lambda: self.step.gradients(micro_batches, 0.0))

    def _due(self, every: int) -> bool:
        """Whether something is due that is done every so many updates, and after the last."""
        last = self.progress.updates == self.recipe.training.updates
        return last or self.progress.updates % every == 0

    def _validate(self) -> float | None:
        """The accuracy as the model is now; notes the best."""
        if self.validate is None:
            return None
        adapters.train_mode(self.model, False)
        accuracy = self.validate()
        adapters.train_mode(self.model)
        progress = self.progress
        progress.validations.append((progress.updates, accuracy))
        if accuracy > progress.best_accuracy:
            progress.best_accuracy = accuracy
            progress.best_update = progress.updates
            if self.recipe.training.keep_best:
                self.best = self.model.trainable_parameters()
        return accuracy

    def _take_best(self) -> None:
        """Give the model the parameters of the best validation, if there is one."""
        if self.best is not None:
            self.model.update(self.best)
        mx.eval(self.model.trainable_parameters())

    def _stop_if_asked(self) -> None:
        """Save and end the run where somebody asked for that, on any rank."""
        asked = self.stop.number is not None
        if self.ranks.size > 1 and self.stop.watched:
            asked = self.ranks.count(asked) > 0
        if not asked:
            return
        if self.folder is not None and self.ranks.first and not self._saved:
            self._save(self.folder)
        raise StoppedError(self.stop.number or signal.SIGTERM)

    def _save(self, folder: RunFolder) -> None:
        """Write a checkpoint."""
        facts = {
            "progress": asdict(self.progress),
            "controller": asdict(self.controller),
            "rows": self.rows,
            "shapes": sorted(self.step.shapes),
            "fingerprint": self.fingerprint,
            "made_with": self.made_with,
        }
        trainable, optimizer = self.model.trainable_parameters(), self.optimizer.state
        folder.save_checkpoint(checkpoint.Checkpoint(trainable, optimizer, self.best, facts))

    def _restore(self) -> None:
        """Take the state of the folder's checkpoint."""
        folder = self.folder
        if folder is None:
            raise OutputError("nothing to resume: this run writes no folder")
        state = checkpoint.load(folder.checkpoint_path)
        facts = state.facts
        if facts["fingerprint"] != self.fingerprint:
            names = checkpoint.difference(facts.get("made_with", {}), self.made_with)
            raise OutputError(
                f"{folder.path}: its checkpoint was made with another recipe, model, data or "
                f"version{f' ({names})' if names else ''}; put that back, or start anew with "
                "--overwrite"
            )
        ours, theirs = (
            {name: array.shape for name, array in tree_flatten(tree)}
            for tree in (self.model.trainable_parameters(), state.trainable)
        )
        if ours != theirs:
            raise OutputError(f"{folder.path}: its checkpoint does not fit this model")
        validations = [tuple(pair) for pair in facts["progress"]["validations"]]
        self.progress = Progress(**facts["progress"] | {"validations": validations})
        if self.ranks.first:
            folder.keep_metrics(self.progress.updates)
        self.model.update(state.trainable)
        self.optimizer.state = state.optimizer
        self.best = state.best
        self.controller = PunishController(**facts["controller"])
        # How an update is cut decides its last bits, and the memory left may be another now.
        self.backoff.rows = facts["rows"]
        self.step.shapes = {tuple(shape) for shape in facts["shapes"]}

    def _diverged(self, totals: Totals) -> DivergedError:
        """The end of a run, with all that helps to find out why."""
        progress, arrays = self.progress, tree_flatten(self.model.trainable_parameters())
        applied, in_a_row = progress.updates - progress.skipped, progress.skipped_in_a_row
        sizes = {name: mx.abs(array.astype(mx.float32)).max().item() for name, array in arrays}
        largest = max(sizes, key=lambda name: sizes[name])
        several = f" ({in_a_row} such updates in a row)" if in_a_row > 1 else ""
        kept = f"what the {applied} others trained is kept" if applied else "nothing was trained"
        way_out = (
            "lower training.learning_rate, or set training.max_gradient_norm, or take the model in "
            "float32 or bfloat16"
        )
        for name, array in tree_flatten(self.model.parameters()):
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                way_out = f"{name} of the model is not finite: take another copy or model"
                break
        return DivergedError(
            f"update {progress.updates}: {totals}: not both finite{several}, so the run stops; "
            f"learning rate {self.optimizer.learning_rate.item():g}, largest trained weight "
            f"{sizes[largest]:.3g} ({largest}); no such update was applied, and {kept}; {way_out}"
        )
