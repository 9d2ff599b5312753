"""The training loop: updates, the PID law, validation, checkpoints."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from abft_mlx import adapters, prefix, runtime
from abft_mlx.errors import RecipeError, StoppedError
from abft_mlx.objective import PunishController
from abft_mlx.prompts import Prompt
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import Recipe
from abft_mlx.stopping import Stop
from abft_mlx.trainer import backoff, finite, memory, plan, state
from abft_mlx.trainer.run_folder import MEASURES, RunFolder, Update
from abft_mlx.trainer.step import Step


@dataclass
class Progress:
    """What a run has come to; plain values that a checkpoint keeps.

    Attributes:
        updates: optimizer updates done.
        tokens: prompt tokens seen, padding left out.
        seconds: wall-clock seconds spent in updates, interruptions left out.
        validations: (updates done, accuracy) pairs, the first before any update.
        best_update: update with the best validation accuracy so far, or None.
        best_accuracy: that accuracy.
        peak_memory_bytes: MLX's peak.
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
    """Runs ABFT, or end-to-end fine-tuning, on a model that has adapters attached.

    Several ranks make the same updates: each takes its share of an update's prompts, and gradients
    and head counts are those of all. The first rank alone writes to the folder, which the others
    only read when they resume.

    Args:
        model: a loaded model, adapters attached, everything else frozen.
        prompts: the training prompts, all with the same number of demonstrations.
        recipe: a resolved recipe; its objective and training sections are used.
        folder: where metrics and checkpoints go, or None to write nothing.
        validate: gives the model's accuracy in 0..1 as it is now; called before the first update,
            every ``training.validate_every`` updates and after the last, where that is not 0. All
            ranks must get the same number.
        on_update: told of every update.
        fingerprint: what is trained on what; a checkpoint with another one is refused.
        made_with: what the fingerprint stands for, by name, so that a refusal can name it.
        on_notice: told, in a line, what a person should know of; a warning where it is left out.
        stop: what may ask the run to end; after the update that goes on it then does.
        ranks: the processes that train together; this one alone if None.

    Attributes:
        best: trainable parameters of the best validation so far, or None.
        kept_hidden: after a run, how much was kept of what lies below the first block that trains
            (:meth:`abft_mlx.trainer.kept.Kept.counts`); None where nothing is kept.

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
        on_update: Callable[[Update], None] | None = None,
        fingerprint: str = "",
        made_with: dict[str, Any] | None = None,
        on_notice: Callable[[str], None] | None = None,
        stop: Stop | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.recipe = recipe
        self.folder = folder
        self.validate = validate if recipe.training.validate_every else None
        self.on_update = on_update
        self.fingerprint = fingerprint
        self.made_with = made_with or {}
        self.on_notice = on_notice or _warn
        self.stop = stop or Stop()
        self.ranks = ranks or Ranks()
        self.progress = Progress()
        self.kept_hidden: dict[str, int] | None = None
        self.best: Any = None
        self._saved = False
        objective, training = recipe.objective, recipe.training
        groups = training.prompts_per_update // training.together
        if groups < self.ranks.size:
            raise RecipeError(
                f"training.prompts_per_update {training.prompts_per_update}: {groups} groups of "
                f"prompts cannot be shared by {self.ranks.size} processes; start at most {groups}"
            )
        assert training.learning_rate is not None, "the recipe must be resolved"
        # End to end, equation 1 is only measured: both its weights are 0.
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
        keeps = training.keep_hidden and training.together == 1
        self.step = Step(
            model,
            self.optimizer,
            reward_weight=self.reward_weight,
            use_filter=objective.filter,
            only_trained=objective.layers == "trained",
            objective=objective.kind,
            lm_head=objective.lm_head if objective.kind == "read_out" else 0.0,
            together=training.together,
            classes=1 + max(label for one in prompts for label in one.demonstration_labels),
            gradient=training.gradient,
            checkpointing=training.gradient_checkpointing,
            max_gradient_norm=training.max_gradient_norm,
            ranks=self.ranks,
            kept_bytes=memory.kept_bytes(model, recipe, self.ranks.size) if keeps else None,
        )
        self._shareable = training.together == 1 or prefix.shareable(model)
        longest = max(len(one.token_ids) for one in prompts)
        self.backoff = backoff.Backoff(
            memory.micro_batch_rows(model, recipe, longest),
            training.together,
            training.micro_batch_tokens == "auto",
            longest,
        )

    @property
    def rows(self) -> int:
        """Prompts of a micro-batch."""
        return self.backoff.rows

    def run(self, *, resume: bool = False) -> Progress:
        """Train from the start, or from the folder's checkpoint, to the last update.

        Where validations were asked for and ``training.keep_best`` is set, the model ends with the
        parameters of the best one.

        Raises:
            DivergedError: the loss stopped being finite; the model is as the last finite update, or
                the best one, left it.
            RunError: memory does not suffice, or a rank is gone.
            UsageError: the ranks were not started alike.
            OutputError: there is nothing to resume, or it belongs to another run.
            StoppedError: it was asked to end, and has saved a checkpoint.
        """
        for _ in self.updates(resume=resume):
            pass
        return self.progress

    def updates(self, *, resume: bool = False) -> Iterator[Progress]:
        """As :meth:`run`, but an update at a time, so that several trainers can take turns.

        Between updates the model may be looked at, not changed; its dropout is on.
        """
        training = self.recipe.training
        runtime.reset_peak_memory()
        settle = state.restore(self) if resume else None
        # Never validate before this: ranks that differ may not validate alike.
        self.ranks.agree(
            f"{self.fingerprint} {self.progress.updates}",
            "recipe, model, data, version or checkpoint",
        )
        if settle is None:
            self._validate()
        elif self.ranks.first:
            settle()  # all ranks have read by now
        adapters.train_mode(self.model)
        try:
            if self.backoff.automatic:
                self._measure()
            while self.progress.updates < training.updates:
                with self.stop.deferred():
                    self._one_update()
                    self._stop_if_asked()
                yield self.progress
        except finite.DivergedError:
            self._take_best()
            raise
        finally:
            adapters.train_mode(self.model, False)
            if self.step.kept is not None:
                self.kept_hidden = self.step.kept.counts()
                self.step.kept.close()
        self._take_best()

    def _take_best(self) -> None:
        if self.best is not None:
            self.model.update(self.best)
        mx.eval(self.model.trainable_parameters())

    def _measure(self) -> None:
        """See how many prompts fit, where a rough estimate leaves a doubt."""
        training, longest = self.recipe.training, self.backoff.longest_tokens
        m, backward = training.together, memory.backward_of(self.recipe)
        each = memory.bytes_per_token(self.model, backward)
        each *= plan.padded_tokens(longest)
        room = runtime.memory_room_bytes() - memory.training_bytes(self.model)
        if each * self.rows * memory.ROUGHLY < room:
            return
        if training.gradient == "exact" and each > room * memory.ROUGHLY:
            self.backoff.fail(f"{room / 1e9:.1f} GB are left")
        groups = range(0, len(self.prompts), m)
        longest_first = sorted(groups, key=lambda row: -len(self.prompts[row].token_ids))

        def peak_bytes(rows: int) -> int:
            begins = longest_first[: rows // m]
            batches = self._cut([self.prompts[row + n] for row in begins for n in range(m)])
            progress = self.progress
            progress.peak_memory_bytes = max(
                progress.peak_memory_bytes, runtime.peak_memory_bytes()
            )
            return memory.peak_bytes(lambda: self.step.gradients(batches, 0.0))

        backoff.attempt(
            lambda peak: self.backoff.measure(peak, room), peak_bytes, self.backoff.fail
        )

    def _cut(self, chosen: Sequence[Prompt]) -> list[plan.MicroBatch]:
        m = self.recipe.training.together
        if m == 1:
            return plan.micro_batches(chosen, self.rows)
        bucket = plan.BUCKET_TOKENS if self.step.compiled else 1
        return plan.shared_micro_batches(
            chosen, m, self.rows, bucket_tokens=bucket, whole=not self._shareable
        )

    def _one_update(self) -> None:
        training, progress = self.recipe.training, self.progress
        start = time.perf_counter()
        m = training.together
        groups = plan.update_rows(
            len(self.prompts) // m,
            training.prompts_per_update // m,
            progress.updates,
            training.seed,
        )
        if self.ranks.size > 1:
            lengths = [len(self.prompts[group * m].token_ids) for group in groups]
            groups = plan.share(groups, lengths, self.ranks.rank, self.ranks.size)
        chosen = [self.prompts[group * m + number] for group in groups for number in range(m)]

        def cut() -> list[plan.MicroBatch]:
            # Dropout's key follows from seed, update and rank, so resuming needs no random state.
            key = (progress.updates << 32) | (training.seed & 0xFFFFFFFF)
            mx.random.seed(key ^ (self.ranks.rank << 56))
            return self._cut(chosen)

        def smaller(said: str) -> list[plan.MicroBatch]:
            self.backoff.smaller(min(self.rows, len(chosen)), said)
            return cut()

        punish_weight = self.controller.punish_weight
        skipped = None
        try:
            totals = self.step.update(cut(), punish_weight, smaller)
            self.controller.update(totals.induction_heads)
            progress.skipped_in_a_row = 0
        except finite.NonFiniteError as error:
            totals, skipped = error.totals, finite.found(error.totals)
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        seconds = time.perf_counter() - start
        progress.updates += 1
        progress.tokens += totals.tokens
        progress.seconds += seconds
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, runtime.peak_memory_bytes())
        last = progress.updates == training.updates
        rate = float(self.optimizer.learning_rate.item())
        ending = None
        if progress.skipped_in_a_row >= min(training.non_finite_updates, training.updates):
            ending = finite.stopped(
                self.model,
                totals,
                update=progress.updates,
                in_a_row=progress.skipped_in_a_row,
                applied=progress.updates - progress.skipped,
                learning_rate=rate,
            )
        accuracy = None
        if (
            ending is None
            and training.validate_every
            and (last or progress.updates % training.validate_every == 0)
        ):
            accuracy = self._validate()
        update = Update(
            step=progress.updates,
            seen_examples=progress.updates * training.prompts_per_update,
            **{name: None if skipped else getattr(totals, name) for name in MEASURES},
            A=punish_weight,
            B=self.reward_weight,
            learning_rate=rate,
            tokens=totals.tokens,
            seconds=seconds,
            peak_memory_bytes=progress.peak_memory_bytes,
            validation_accuracy=accuracy,
            note=self.backoff.news(),
            skipped=skipped,
            compilations=self.step.compilations.count if self.step.compiled else None,
        )
        if self.folder is not None and self.ranks.first:
            self.folder.add_metrics(update)
            self._saved = ending is None and (
                last or progress.updates % training.checkpoint_every == 0
            )
            if self._saved:
                state.save(self, self.folder)
        if self.on_update is not None:
            self.on_update(update)
        if ending is not None:
            raise ending

    def _stop_if_asked(self) -> None:
        asked = self.stop.number is not None
        if self.ranks.size > 1 and self.stop.watched:
            asked = self.ranks.count(asked) > 0
        if not asked:
            return
        if self.folder is not None and self.ranks.first and not self._saved:
            state.save(self, self.folder)
        raise StoppedError(self.stop.number or signal.SIGTERM)

    def _validate(self) -> float | None:
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


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)
