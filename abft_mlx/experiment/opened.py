"""What a recipe names, opened: model, data, prompts, and what can be seen and measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import (
    adapters,
    attention,
    data,
    evaluation,
    loading,
    ports,
    prefix,
    prompts,
    read_out,
    runtime,
)
from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.events import Events
from abft_mlx.induction import (
    REPEATED_TOKENS,
    SEQUENCES,
    Detected,
    Example,
    HeadCensus,
    Heads,
    HeadState,
    Window,
    detect,
)
from abft_mlx.prompts import Prompt, Prompts
from abft_mlx.ranks import Ranks
from abft_mlx.task import Task, least_demonstrations, open_task

# The paper trains W_Q and W_K themselves up to this size, and LoRA above.
FULL_PARAMETERS = 10e9
EXAMPLES = 3
# All rows of all examples and states; beyond this fewer examples are kept.
EXAMPLE_BYTES = 16 * 2**20
# At least so many tokens are decoded again for the text of each.
DECODED_TOKENS = 16


@dataclass(frozen=True)
class Experiment:
    """A recipe with everything that it names opened and checked.

    Attributes:
        recipe: the resolved recipe.
        loaded: model, tokenizer and what is known of them.
        task: what is measured, and trained on unless there is a mixture.
        mixture: the tasks that are trained on at once, if the recipe names several.
        others: the tasks that the transfer protocol measures on.
        window: how the recipe's ``adapter.layers`` were found, where a census did.
    """

    recipe: recipes.Recipe
    loaded: loading.Loaded
    task: Task
    mixture: tuple[Task, ...] = ()
    others: tuple[Task, ...] = ()
    window: Window | None = None

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """What training prompts are made of: the mixture, or the task."""
        return self.mixture or (self.task,)

    def training_prompts(self) -> Prompts:
        """The training prompts: k + 1 rows of the training split each, the last one the query.

        A mixture's prompts come from its tasks in turn, ``training.examples`` in all.
        """
        training, m, count = self.recipe.training, self.recipe.training.together, len(self.mixture)
        if not count:
            return self.task.training_prompts(training)
        each = -(-training.examples // (m * count)) * m
        share = training.model_copy(update={"examples": each})
        by_task = [task.training_prompts(share) for task in self.mixture]

        def build(number: int) -> Prompt:
            group, place = divmod(number, m)
            return by_task[group % count][group // count * m + place]

        return Prompts(training.examples, build)

    def validation_prompts(self) -> Prompts:
        """Queries from the validation split, demonstrations from the training split."""
        return self.task.validation_prompts(self.recipe.training)

    def test_prompts(self) -> Prompts:
        """The fixed, seeded prompts of an evaluation."""
        return self.task.test_prompts(self.recipe.evaluation)

    def measure(
        self, chosen: Sequence[Prompt], events: Events | None = None, ranks: Ranks | None = None
    ) -> dict[str, Any]:
        """One method of eval's JSON of the model as it is now: its metrics and ``right``."""
        probabilities = evaluation.label_probabilities(
            self.loaded.model,
            chosen,
            self.task.space,
            batch_tokens=self.recipe.evaluation.batch_tokens,
            on_progress=(events or Events()).progress,
            ranks=ranks,
        )
        gold = np.array([prompt.gold for prompt in chosen])
        right = evaluation.right_string(probabilities, gold)
        return evaluation.summary(probabilities, gold) | {"right": right}

    def measure_all(
        self, events: Events | None = None, ranks: Ranks | None = None
    ) -> dict[str, Any]:
        """The parts of eval's JSON that the recipe asks for, of the model as it is now."""
        return evaluation.measure(
            self.loaded.model,
            self.task,
            self.recipe.evaluation,
            trained=self.trained_tasks,
            others=self.others,
            events=events,
            ranks=ranks,
        )

    def census(
        self, chosen: Sequence[Prompt], events: Events | None = None, done: int = 0, total: int = 0
    ) -> HeadCensus:
        """What every head does with the label tokens of some prompts.

        Args:
            chosen: the prompts.
            events: who hears of the progress, from ``done`` to ``total`` if that is not 0.
            done: what was looked at before.
            total: all that is looked at.
        """
        census = HeadCensus()
        limit = runtime.batch_tokens(self.recipe.evaluation.batch_tokens)
        for batch in prompts.batches(chosen, max_tokens=limit):
            last = mx.array(batch.last)
            census.add(
                attention.capture(self.loaded.model, mx.array(batch.tokens), last),
                mx.array(batch.label_positions),
                mx.array(batch.demonstration_labels),
                mx.array(batch.gold),
                last,
            )
            if events is not None:
                events.progress(done + census.prompts, total or len(chosen))
        return census

    def heads(
        self,
        chosen: Sequence[Prompt],
        *,
        detectors: bool = False,
        examples: int = EXAMPLES,
        adapter: str | None = None,
        events: Events | None = None,
    ) -> Heads:
        """What the model's heads do: ``before``, and ``after`` with its adapter, if it has one.

        Args:
            chosen: prompts for the census; the first of every class in turn become examples.
            detectors: also score every head on repeated random tokens.
            examples: prompts whose rows are kept.
            adapter: what to call the adapter in the facts.
            events: who hears of the progress, over all states; random rows are counted, too.
        """
        model, events = self.loaded.model, events or Events()
        # Prompts of as many classes as can be, each with a demonstration that has its label.
        able = [prompt for prompt in chosen if prompt.gold in prompt.demonstration_labels] or chosen
        first = {prompt.gold: n for n, prompt in reversed(list(enumerate(able)))}
        order = sorted(range(len(able)), key=lambda n: (first[able[n].gold] != n, n))
        picked = [able[n] for n in order[:examples]]
        states: dict[str, HeadState] = {}
        rows: list[dict[str, np.ndarray]] = [{} for _ in picked]
        each = len(chosen) + (SEQUENCES if detectors else 0)
        total = each * (2 if adapters.adapted(model) else 1)
        for name in _states(model):
            done = len(states) * each
            census = self.census(chosen, events, done, total)
            detected = None
            if detectors:
                detected = self._detected(events, done + len(chosen), total)
            states[name] = replace(HeadState.of(census, detected), weight=_weights(model))
            for prompt, by_state in zip(picked, rows, strict=True):
                by_state[name] = _rows(model, prompt)
        example_bytes = sum(table.nbytes // 2 for table in rows[0].values()) if rows else 0
        kept = min(len(picked), EXAMPLE_BYTES // max(example_bytes, 1))
        return Heads(
            states=states,
            examples=tuple(
                self._example(prompt, rows[n]) for n, prompt in enumerate(picked[:kept])
            ),
            labels=tuple(self.task.space.names),
            prompts=len(chosen),
            facts={
                "model": self.loaded.source,
                "data": self.task.texts.source,
                "seed": self.recipe.evaluation.seed,
                "k": self.recipe.prompt.demonstrations,
                "adapter": adapter,
            },
        )

    def example(self, prompt: Prompt) -> Example:
        """A prompt's token texts and every head's last row, without and with an adapter.

        Args:
            prompt: one of the experiment's, or of its task's builder.
        """
        model = self.loaded.model
        return self._example(prompt, {name: _rows(model, prompt) for name in _states(model)})

    def _example(self, prompt: Prompt, rows: dict[str, np.ndarray]) -> Example:
        """A prompt as heads.npz keeps it."""
        return Example(
            token_texts(self.loaded.tokenizer, prompt.token_ids),
            np.array(prompt.label_positions),
            np.array(prompt.demonstration_labels),
            prompt.gold,
            rows,
        )

    def _detected(self, events: Events, done: int, total: int) -> Detected:
        """The scores of the classic detectors, on repeated random tokens."""
        tokenizer = self.loaded.tokenizer
        special = {int(token) for token in getattr(tokenizer, "all_special_ids", ())}
        vocabulary = np.array([n for n in range(len(tokenizer.get_vocab())) if n not in special])
        context = ((self.loaded.context_tokens or 2**31) - 1) // 2
        return detect(
            self.loaded.model,
            vocabulary,
            start=self.task.builder.start,
            repeated_tokens=min(REPEATED_TOKENS, context, len(vocabulary)),
            seed=self.recipe.evaluation.seed,
            on_progress=lambda rows, _: events.progress(done + rows, total),
        )


def _states(model: nn.Module) -> Iterator[str]:
    """The names of the model's states, the model in each of them meanwhile."""
    if not adapters.adapted(model):
        yield "before"
        return
    with adapters.without(model):
        yield "before"
    yield "after"


def _rows(model: nn.Module, prompt: Prompt) -> np.ndarray:
    """(L, H, T) float32, NaN for layers without heads."""
    tokens = np.array([prompt.token_ids], dtype=np.int32)
    rows = attention.capture(model, tokens, np.array([prompt.last]))
    heads = max((row.shape[1] for row in rows if row is not None), default=0)
    table = np.full((len(rows), heads, tokens.shape[1]), np.nan, dtype=np.float32)
    for layer, row in enumerate(rows):
        if row is not None:
            table[layer, : row.shape[1]] = np.asarray(row[0])
    return table


def _weights(model: nn.Module) -> np.ndarray | None:
    """(L, H) weights of the model's read-out, NaN where there is no head; None without one."""
    weights = read_out.of(model)
    if weights is None:
        return None
    counts = ports.head_counts(model)
    table = np.full((len(ports.heads(model)), max(counts.values())), np.nan)
    for layer, values in weights.weights().items():
        table[layer, : len(values)] = values
    return table


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, ...]:
    """What each of T tokens adds to the text, so that all together are the text.

    A token that ends inside a character adds nothing, and the one that completes it the character.
    """
    ids = [int(token) for token in token_ids]
    texts: list[str] = []
    # Only the last tokens are decoded, from a place where a character ends: a decoder may take
    # back characters until their bytes end, and spaces that are cleaned up.
    start, whole, shown = 0, 0, ""
    for n in range(len(ids)):
        text = tokenizer.decode(ids[start : n + 1])
        ends = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if n + 1 < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if shown.startswith(text):
            texts.append("")
        else:
            pairs = enumerate(zip(shown, text, strict=False))
            parting = next((n for n, (a, b) in pairs if a != b), min(len(shown), len(text)))
            texts.append(text[parting:])
            shown = text
        if ends and n + 1 - whole >= DECODED_TOKENS:
            # What was a whole character one window ago begins the next.
            if whole > start:
                start = whole
                shown = tokenizer.decode(ids[start : n + 1])
            whole = n + 1
    return tuple(texts)


def prepare(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    processes: int = 1,
    events: Events | None = None,
    trained_on: str | None = None,
) -> Experiment:
    """Open everything that a recipe names, and check that it fits together.

    Args:
        recipe: what to open.
        adapter: a run folder, adapter folder or hub id of what to put on the model.
        processes: that will share every update.
        events: who hears what is opened.
        trained_on: fingerprint of a run's texts; all rows of other texts are test rows.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    events, recipe = events or Events(), recipes.resolve(recipe)
    others = recipe.evaluation.transfer if "transfer" in recipe.evaluation.protocols else []
    if not others and "transfer" in recipe.evaluation.protocols:
        raise RecipeError(
            "protocol transfer measures on other tasks and evaluation.transfer is empty; name "
            "recipes of other tasks there, or with --transfer"
        )
    sections = [recipes.task(recipe), *recipe.mixture, *others]
    # Texts first: a model may have to be downloaded.
    texts, splits = [], []
    for section in sections:
        events.stage(f"reading {section.data.source}")
        texts.append(data.load(section.data))
        splits.append(data.split(texts[-1], section.data, least_demonstrations(section)))
    if trained_on not in (None, texts[0].fingerprint()):
        splits[0] = data.all_test(texts[0])
    events.stage(f"opening {recipe.model}")
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    tasks = [
        open_task(section, read, loaded.tokenizer, loaded.context_tokens, parts)
        for section, read, parts in zip(sections, texts, splits, strict=True)
    ]
    count = 1 + len(recipe.mixture)
    return _fitted(recipe, loaded, tasks[:count], tuple(tasks[count:]), processes)


def open_texts(
    recipe: recipes.Recipe, texts: data.LabelledTexts, adapter: str | Path | None = None
) -> Experiment:
    """Open a recipe's model for texts that stand in for the recipe's data: none are for testing.

    Args:
        recipe: model, prompts and training; of its data section only sizes and seed are used.
        texts: labelled, for training and validation.
        adapter: a run folder or mlx-lm adapter folder to put on the model.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    recipe = recipes.resolve(recipe)
    if recipe.mixture:
        raise RecipeError(
            f"mixture names {len(recipe.mixture)} tasks, and only the texts given here are trained "
            "on; leave it out, or use abft_mlx.finetune"
        )
    section = recipes.task(recipe)
    everything = section.data.model_copy(update={"holdout": "none"})
    splits = data.split(texts, everything, least_demonstrations(section))
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    task = open_task(section, texts, loaded.tokenizer, loaded.context_tokens, splits)
    return _fitted(recipe, loaded, [task])


def _fitted(
    recipe: recipes.Recipe,
    loaded: loading.Loaded,
    tasks: list[Task],
    others: tuple[Task, ...] = (),
    processes: int = 1,
) -> Experiment:
    """The experiment, its recipe with what depends on texts and model written out."""
    task, *mixture = tasks
    if recipe.adapter.kind == "paper":
        large = loading.parameter_count(loaded.model) > FULL_PARAMETERS
        kind = "lora" if large or "quantization" in loaded.config else "full"
        adapter = recipe.adapter.model_copy(update={"kind": kind})
        recipe = recipes.resolve(recipe.model_copy(update={"adapter": adapter}))
    sections = [part.section for part in mixture]
    recipe = recipe.model_copy(update={"prompt": task.section.prompt, "mixture": sections})
    recipes.check_mixture(task.demonstrations, recipe.mixture)
    recipe = recipes.share(recipe, processes, able=prefix.shareable(loaded.model))
    return Experiment(recipe, loaded, task, tuple(mixture), others)
