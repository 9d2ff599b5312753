"""Labels of texts that nobody labelled: fixed demonstrations, computed once, and a stream of texts.

What is asked is what ``abft-mlx eval`` asks by its vanilla method: the label tokens' probabilities
at the last position of a prompt of demonstrations and a text. All prompts have the same
demonstrations here, so that their keys and values are cached (``prefix.Prefix``).

Letters: N texts, C labels, K demonstrations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx import adapters, data, evaluation, loading, prompts
from abft_mlx import recipe as recipes
from abft_mlx.errors import PromptError
from abft_mlx.prefix import Prefix, common_prefix
from abft_mlx.task import prompt_builder

# Texts are sorted by length within as many as fill this many batches; their answers wait for it.
LOOKAHEAD_BATCHES = 8
# Queries that share no beginning, so that what their prompts have in common is mostly in every one.
_PROBES = ("a", "7", "(", "É", "The", "\u4e2d")


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        text: as it was read.
        label: the name of the most probable class; the first of equals.
        probabilities: of each class, by name; they sum to 1.
    """

    text: str
    label: str
    probabilities: dict[str, float]


class Predictor:
    """A model with fixed demonstrations.

    Attributes:
        model: as it was given.
        builder: makes the prompts; counts the texts that it shortened.
        demonstrations: the K pairs of text and class number that every prompt shows.
        prefix: what is cached of them, computed anew if a text turns up whose first token takes in
            what stands before it; empty for models whose prompts must be computed whole.
    """

    def __init__(
        self,
        model: nn.Module,
        builder: prompts.PromptBuilder,
        demonstrations: Sequence[tuple[str, int]],
        batch_tokens: int,
    ) -> None:
        """Compute what all prompts share.

        Args:
            model: a loaded model, which is not to change from now on.
            builder: of the task's prompts.
            demonstrations: K pairs of text and class number.
            batch_tokens: tokens in one batch, padding and cached ones included.

        Raises:
            PromptError: the demonstrations make no prompt.
        """
        self.builder = builder
        self.demonstrations = tuple(demonstrations)
        self.model = model
        self._batch_tokens = batch_tokens
        self.prefix = Prefix(model, self._shared())

    def predict(self, arrivals: Iterable[Sequence[data.Query]]) -> Iterator[list[Prediction]]:
        """Answers in the order of the texts, a list as soon as it is there.

        No more is read than is about to be answered, and never more than LOOKAHEAD_BATCHES batches
        are kept, so that memory is bounded however many texts come.

        Args:
            arrivals: lists of texts, each of those that are there at once.

        Raises:
            UsageError: a text cannot be used; those before it have been answered.
        """
        for arrived in arrivals:
            asked: list[tuple[data.Query, prompts.Prompt]] = []
            tokens = 0
            for query in arrived:
                try:
                    prompt = self._prompt(query.text, query.place)
                except PromptError:
                    yield self._answers(asked)
                    raise
                asked.append((query, prompt))
                tokens += len(prompt.token_ids)
                if tokens >= LOOKAHEAD_BATCHES * self._batch_tokens:
                    yield self._answers(asked)
                    asked, tokens = [], 0
            if asked:
                yield self._answers(asked)

    def probabilities(self, asked: Sequence[prompts.Prompt]) -> np.ndarray:
        """Label probabilities of prompts, (N, C) float64."""
        return evaluation.label_probabilities(
            self.model,
            asked,
            self.builder.space,
            batch_tokens=self._batch_tokens,
            prefix=self.prefix,
        )

    def _answers(self, asked: Sequence[tuple[data.Query, prompts.Prompt]]) -> list[Prediction]:
        names = self.builder.space.names
        chosen = [prompt for _, prompt in asked]
        self._shorten(chosen)
        found = self.probabilities(chosen)
        return [
            Prediction(query.text, names[row.argmax()], dict(zip(names, row.tolist(), strict=True)))
            for (query, _), row in zip(asked, found, strict=True)
        ]

    def _prompt(self, text: str, where: str) -> prompts.Prompt:
        # Nothing here looks at the gold label, which nobody knows.
        return self.builder.build(self.demonstrations, text, 0, where=where)

    def _shorten(self, asked: Sequence[prompts.Prompt]) -> None:
        """Have a prefix that these prompts begin with; down to the last label, all of them do."""
        kept = self.prefix.token_ids
        shared = common_prefix([kept, *(one.token_ids for one in asked)])
        if len(shared) < len(kept):
            self.prefix = Prefix(self.model, shared)

    def _shared(self) -> tuple[int, ...]:
        """The tokens that prompts begin with, as far as a few texts can tell."""
        made, failed = [], None
        for probe in (*_PROBES, *(text for text, _ in self.demonstrations)):
            try:
                made.append(self._prompt(probe, "a prompt of the demonstrations").token_ids)
            except PromptError as error:
                failed = error
        if not made:
            assert failed is not None
            raise failed
        return common_prefix(made)


@dataclass(frozen=True)
class Opened:
    """A predictor, and what it was made of.

    Attributes:
        recipe: the resolved recipe.
        predictor: ready to predict.
        source: where the demonstrations come from.
        rows: K row numbers there, from 1.
    """

    recipe: recipes.Recipe
    predictor: Predictor
    source: str
    rows: tuple[int, ...]

    def shown(self) -> list[dict[str, Any]]:
        """The demonstrations, as they are reported: text and label."""
        names = self.predictor.builder.space.names
        return [
            {"text": text, "label": names[label]} for text, label in self.predictor.demonstrations
        ]


def class_names(section: recipes.DataSection) -> tuple[str, ...]:
    """The classes of a recipe's data: those that it lists, or those that its texts have."""
    return tuple(section.labels or data.load(section).names)


def read_demonstrations(
    section: recipes.DataSection, source: str, names: Sequence[str]
) -> data.LabelledTexts:
    """Read a file of labelled texts to show.

    Args:
        section: the columns of texts and labels, and what to do with empty texts.
        source: the file.
        names: the classes, in order.

    Raises:
        DataError: it cannot be read, or holds problems.
    """
    given = {"source": source, "labels": list(names), "config": None, "split": "train"}
    return data.load(section.model_copy(update=given))


def prepare(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    demonstrations: str | data.LabelledTexts | None = None,
) -> Opened:
    """Open what a recipe names for prediction.

    Args:
        recipe: names model, data, prompts and the seed that chooses demonstrations.
        adapter: a run folder, adapter folder or hub id of what to put on the model.
        demonstrations: labelled texts, or a file of them, all of which are shown, in order.
            Without any they are drawn as for eval's first prompt: by ``evaluation.seed`` from the
            part of the data that is kept for demonstrations.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    recipe = recipes.resolve(recipe)
    section = recipes.task(recipe)
    source = section.data.source
    if demonstrations is None:
        texts = data.load(section.data)
        names = texts.names
        k = section.prompt.demonstrations
        part = data.split(texts, section.data, k)
        pool = part.demonstrations
        drawn = data.demonstration_rows(1, 1, len(pool), k, recipe.evaluation.seed)[0]
        pairs = [pool.pairs()[row] for row in drawn]
        rows = tuple(part.rows["demonstrations"][row] + 1 for row in drawn)
    else:
        if isinstance(demonstrations, str):
            demonstrations = read_demonstrations(
                section.data, demonstrations, class_names(section.data)
            )
        names, source = demonstrations.names, demonstrations.source
        pairs = demonstrations.pairs()
        rows = tuple(range(1, len(pairs) + 1))
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=adapter)
    builder = prompt_builder(section, names, loaded.tokenizer, loaded.context_tokens)
    predictor = Predictor(loaded.model, builder, pairs, recipe.evaluation.batch_tokens)
    return Opened(recipe, predictor, source, rows)


def behind(
    recipe: recipes.Recipe,
    model: nn.Module,
    builder: prompts.PromptBuilder,
    demonstrations: data.LabelledTexts,
) -> Opened:
    """A model that is open already, with demonstrations for prediction.

    Args:
        recipe: the resolved recipe.
        model: is not to change from now on.
        builder: of the task's prompts.
        demonstrations: all are shown, in order, and have the builder's classes.

    Raises:
        PromptError: the demonstrations make no prompt.
    """
    pairs = demonstrations.pairs()
    predictor = Predictor(model, builder, pairs, recipe.evaluation.batch_tokens)
    return Opened(recipe, predictor, demonstrations.source, tuple(range(1, len(pairs) + 1)))
