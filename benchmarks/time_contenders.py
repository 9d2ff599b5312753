"""Who trains in ``time_to_accuracy.py``: our modes, mlx-lm's own way, the paper's way in PyTorch.

All start from the same base, see the prompts of one recipe in the same order, and are measured by
our own evaluation. What differs besides the way: ``shared`` modes draw their own prompts, since
groups of them share demonstrations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.trainer import iterate_batches

from abft_mlx import adapters, experiment, ports, recipe
from abft_mlx.adapters.attach import targets
from abft_mlx.bench import contenders as bench
from abft_mlx.bench import torch_way
from abft_mlx.errors import UsageError
from abft_mlx.events import OnUpdate
from abft_mlx.objective import PunishController
from abft_mlx.prompts import Prompt
from abft_mlx.trainer import Trainer, plan

# Best of 2e-5, 1e-4, 2e-4, 5e-4 and 1e-3 after 32 updates on the demo task, which is not held out.
FULL_LEARNING_RATE = 1e-3

_LOCAL = "training.gradient=local"
_ALONE, _SHARED = (f"training.shared_demonstrations={m}" for m in (1, 8))
_FULL = ("adapter.kind=full", f"training.learning_rate={FULL_LEARNING_RATE:g}")
OURS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "local": (_LOCAL,),
    "shared": (_SHARED,),
    "local_shared": (_LOCAL, _SHARED),
    "auto": ("adapter.layers=auto",),
    "auto_shared": ("adapter.layers=auto", _SHARED),
    "full": _FULL,
}
MLX_LM, MLX_LM_QK, PYTORCH = "mlx-lm", "mlx-lm-qk", "pytorch-paper"
NAMES = (*OURS, MLX_LM, MLX_LM_QK, PYTORCH)


class Contender:
    """One way of training, an update at a time, with a clock that runs only inside updates.

    Args:
        opened: what it trains and is measured on; its model is its own.

    Attributes:
        setup_seconds: what training needs once that is no update: a census, where it has one.
        seconds: of every update so far.
        threads: of PyTorch, where it trains.
        warming_up: whether an update was the first, or had to compile for a new shape.
        losses: of every update so far.
    """

    def __init__(self, opened: experiment.Experiment) -> None:
        self.opened = opened
        self.prompts = opened.training_prompts()
        self.setup_seconds = 0.0
        self.threads: int | None = None
        self.seconds: list[float] = []
        self.warming_up: list[bool] = []
        self.losses: list[float] = []

    def update(self) -> None:
        """Make one update, and wait for it."""
        raise NotImplementedError

    def accuracy(self, test: list[Prompt]) -> float:
        """In 0..1, of the model as it is now."""
        return self.opened.measure(test)["accuracy"]

    def _next_prompts(self) -> list[Prompt]:
        training = self.opened.recipe.training
        rows = plan.update_rows(
            len(self.prompts), training.prompts_per_update, len(self.seconds), training.seed
        )
        return [self.prompts[row] for row in rows]


class Ours(Contender):
    """Our own trainer."""

    def __init__(self, opened: experiment.Experiment) -> None:
        super().__init__(opened)
        start = time.perf_counter()
        self.opened = opened.with_layers(self.prompts)
        if self.opened.window is not None:
            self.setup_seconds = time.perf_counter() - start
        settings, model = self.opened.recipe, opened.loaded.model
        adapters.attach(model, settings.adapter, seed=settings.training.seed)
        self.trainer = Trainer(
            model,
            self.prompts,
            settings,
            events=OnUpdate(lambda one: self.losses.append(one.loss)),
        )
        self.updates = self.trainer.updates()

    def update(self) -> None:
        """One more of the trainer's."""
        seconds, shapes = self.trainer.progress.seconds, len(self.trainer.step.shapes)
        next(self.updates)
        self.seconds.append(self.trainer.progress.seconds - seconds)
        step = self.trainer.step
        compiled = step.compiled and len(step.shapes) > shapes
        self.warming_up.append(compiled or len(self.seconds) == 1)

    def accuracy(self, test: list[Prompt]) -> float:
        """With dropout off, where there is any."""
        adapters.train_mode(self.opened.loaded.model, False)
        found = super().accuracy(test)
        adapters.train_mode(self.opened.loaded.model)
        return found


class MlxLm(Contender):
    """mlx-lm's LoRA step: cross-entropy of the label token, in its batches.

    Args:
        opened: what it trains and is measured on.
        keys: which linear layers of a block get LoRA; None for mlx-lm's default.
    """

    def __init__(self, opened: experiment.Experiment, keys: list[str] | None = None) -> None:
        super().__init__(opened)
        training = opened.recipe.training
        mx.random.seed(training.seed)
        self.step = bench.mlx_lm_updates(opened.loaded.model, training.learning_rate, keys)
        self.shapes: set[tuple[int, ...]] = set()

    def update(self) -> None:
        """Batch, step and wait, as its loop does."""
        start = time.perf_counter()
        tokens, counted = label_batch(self._next_prompts())
        loss = self.step(tokens, counted)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)
        self.warming_up.append(tokens.shape not in self.shapes)
        self.shapes.add(tokens.shape)


def label_batch(prompts: Sequence[Prompt]) -> tuple[mx.array, mx.array]:
    """One batch as mlx-lm pads it, in which only the label token counts.

    Its loss counts one position more than its batches hold tokens (padding, that is), which is
    left out here: it would train mlx-lm on something else than the label.

    Returns:
        (B, T) tokens and (B, 2) first and last counted position.
    """
    rows = [([*one.token_ids, *one.target], len(one.token_ids)) for one in prompts]
    longest = max(len(tokens) for tokens, _ in rows)
    tokens, counted = next(iterate_batches(rows, len(rows), longest + 64))
    return tokens, counted - mx.array([0, 1])


class Paper(Contender):
    """transformers' eager attention, a prompt at a time; W_Q and W_K in full, A steered as ours."""

    def __init__(self, opened: experiment.Experiment) -> None:
        super().__init__(opened)
        import transformers

        # Its own bars and advice would stand between our lines.
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        objective = opened.recipe.objective
        model = transformers.AutoModelForCausalLM.from_pretrained(
            opened.loaded.path, attn_implementation="eager"
        )
        self.weights = dict(model.named_parameters())
        self.names = [f"{one.path}.weight" for one in targets(opened.loaded.model)]
        if not all(name in self.weights for name in self.names):
            raise UsageError(
                f"{PYTORCH}: {opened.loaded.source} has no {self.names[0]} in transformers; leave "
                f"{PYTORCH} out of --contenders"
            )
        self.step = torch_way.PaperStep(
            model,
            opened.recipe.training.learning_rate,
            reward_weight=objective.reward,
            use_filter=objective.filter,
        )
        self.threads = fastest_threads(model, self.prompts[:4])
        self.controller = PunishController(
            objective.punish,
            enabled=objective.pid,
            cp=objective.cp,
            ci=objective.ci,
            cd=objective.cd,
        )

    def update(self) -> None:
        """One update of accumulated gradients, and of A."""
        start = time.perf_counter()
        loss, heads = self.step.update(self._next_prompts(), self.controller.punish_weight)
        self.controller.update(heads)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)
        self.warming_up.append(len(self.seconds) == 1)

    def accuracy(self, test: list[Prompt]) -> float:
        """By our evaluation: the trained weights are copied into the MLX model."""
        found = {name: self.weights[name].detach().cpu().numpy() for name in self.names}
        self.opened.loaded.model.load_weights(
            [(name, mx.array(np.array(one))) for name, one in found.items()], strict=False
        )
        return super().accuracy(test)


def fastest_threads(model: Any, prompts: Sequence[Prompt]) -> int:
    """Give PyTorch one thread or all, whichever is faster on these prompts here and now.

    Models as small as this one lose by threads that wait for each other, the more so on a busy
    machine.

    Returns:
        The number that it now has.
    """
    import torch

    every = sorted({1, torch.get_num_threads()})
    taken = dict.fromkeys(every, math.inf)
    with torch.no_grad():
        for _ in range(3):
            for threads in every:
                torch.set_num_threads(threads)
                start = time.perf_counter()
                for prompt in prompts:
                    ids = torch.tensor([prompt.token_ids])
                    model(input_ids=ids, output_attentions=True, use_cache=False)
                taken[threads] = min(taken[threads], time.perf_counter() - start)
    best = min(every, key=lambda threads: taken[threads])
    torch.set_num_threads(best)
    return best


def check(names: Sequence[str]) -> None:
    """See that there are such contenders, and what they need.

    Raises:
        UsageError: there is none of that name, or torch is missing.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f"contender {name!r} is not known; there are {', '.join(NAMES)}")
    missing = [one for one in ("torch", "transformers") if find_spec(one) is None]
    if PYTORCH in names and missing:
        raise UsageError(
            f"{PYTORCH} needs {missing[0]}; install abft-mlx[bench], or leave it out of "
            "--contenders"
        )


def make(name: str, task: str, settings: Sequence[str]) -> Contender:
    """Open a task for one contender.

    Args:
        name: of :data:`NAMES`.
        task: a recipe's name or file.
        settings: ``section.key=value`` each, the same for all contenders.
    """
    own = OURS.get(name, _FULL if name == PYTORCH else ())
    opened = experiment.prepare(recipe.load(task, [_ALONE, *settings, *own]))
    if name in OURS:
        return Ours(opened)
    if name == PYTORCH:
        return Paper(opened)
    return MlxLm(opened, our_keys(opened.loaded.model) if name == MLX_LM_QK else None)


def our_keys(model: nn.Module) -> list[str]:
    """W_Q and W_K as mlx-lm's LoRA keys name them: by their path in a block."""
    blocks = [f"{one.path}." for one in ports.port_for(model).blocks(model)]
    paths = [one.path for one in targets(model)]
    return sorted(
        {path.removeprefix(block) for path in paths for block in blocks if path.startswith(block)}
    )
