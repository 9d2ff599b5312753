"""A run as a classifier: fixed demonstrations, a calibration, and a stream of texts to label.

Every prompt shows the same demonstrations, so their keys and values are computed once
(``prefix.Prefix``). What a run ships (demonstrations, label words, calibration) lies in its folder
and needs nothing else: :class:`Shipped`.

Letters: N texts, C labels, K demonstrations.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx import adapters, data, evaluation, files, loading, prompts, read_out
from abft_mlx import recipe as recipes
from abft_mlx.errors import DataError, OutputError, PromptError, first_few
from abft_mlx.prefix import Prefix, common_prefix
from abft_mlx.ranks import Ranks
from abft_mlx.task import demonstrations_that_fit, least_demonstrations, prompt_builder

DEMONSTRATIONS_FILE = "demonstrations.jsonl"
# With fewer texts, the mean of their log-probabilities is more noise than bias.
LEAST_CALIBRATION_TEXTS = 8
# Of texts to label that centre a read-out whose own centring is for other demonstrations.
CENTRING_TEXTS = 64
# Texts are sorted by length within as many as fill this many batches; their answers wait for it.
LOOKAHEAD_BATCHES = 8
# Queries that share no beginning, so that what their prompts have in common is mostly in every one.
_PROBES = ("a", "7", "(", "É", "The", "\u4e2d")


@dataclass(frozen=True)
class Prediction:
    """A text, its most probable class (the first of equals), and all classes' probabilities."""

    text: str
    label: str
    probabilities: dict[str, float]


class Predictor:
    """A model with fixed demonstrations.

    A model with a read-out (:mod:`abft_mlx.read_out`) answers from the attention to the
    demonstrations' labels, any other with its LM head.

    Attributes:
        model: a loaded model, which must not change while the predictor lives.
        builder: makes the prompts; counts the texts that it shortened.
        demonstrations: K pairs of text and class number, shown in every prompt.
        nearest: how many of the demonstrations, the most similar ones, each text is shown; prompts
            then share nothing. None means all.
        prefix: what is cached of the demonstrations; empty for models whose prompts must be
            computed whole.
        reads_attention: whether the answer is read from the attention.
        calibration: (C,) mean log-probability of each class over other texts behind the same
            demonstrations, which is subtracted (batch calibration, arXiv 2309.17249; the
            read-out's centring); or None.
        temperature: by which calibrated scores are divided, so that probabilities are as often
            right as they say.
    """

    def __init__(
        self,
        model: nn.Module,
        builder: prompts.PromptBuilder,
        demonstrations: Sequence[tuple[str, int]],
        batch_tokens: int,
        calibration: np.ndarray | None = None,
        nearest: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Compute what all prompts share; ``batch_tokens`` counts padding and cached tokens.

        Raises:
            PromptError: the demonstrations make no prompt.
        """
        self.model = model
        self.builder = builder
        self.demonstrations = tuple(demonstrations)
        self.calibration = calibration
        self.temperature = temperature
        self.nearest = nearest
        self.reads_attention = read_out.of(model) is not None
        self._batch_tokens = batch_tokens
        texts = [text for text, _ in demonstrations] if nearest else []
        self._folded = [data.fold(text) for text in texts]
        self._nearest = data.Nearest(texts) if nearest else None
        self.prefix = Prefix(model, self._beginning())

    @property
    def k(self) -> int:
        """Demonstrations in a prompt."""
        return self.nearest or len(self.demonstrations)

    def shown(self, text: str) -> list[tuple[str, int]]:
        """The demonstrations of a text's prompt; never the text itself, whatever its case."""
        if self.nearest is None or self._nearest is None:
            return list(self.demonstrations)
        folded = data.fold(text)
        same = [row for row, other in enumerate(self._folded) if other == folded]
        return [self.demonstrations[row] for row in self._nearest.rows(text, self.nearest, same)]

    def named(self) -> list[dict[str, str]]:
        """The demonstrations by ``text`` and ``label``."""
        names = self.builder.space.names
        return [{"text": text, "label": names[label]} for text, label in self.demonstrations]

    def prompts_of(self, pairs: Iterable[tuple[str, int]]) -> list[prompts.Prompt]:
        """Prompts of labelled texts, to measure with."""
        return [
            self.builder.build(
                self.shown(pair[0]), *pair, where=getattr(pair, "place", f"text {n}")
            )
            for n, pair in enumerate(pairs, 1)
        ]

    def predict(self, arrivals: Iterable[Sequence[data.Query]]) -> Iterator[list[Prediction]]:
        """Answers in the order of the texts, which come in lists of those that are there at once.

        Memory is bounded however many texts come: at most LOOKAHEAD_BATCHES batches are read
        ahead. A read-out that has not been centred is centred by the first texts, if at least
        LEAST_CALIBRATION_TEXTS arrive at once.

        Raises:
            UsageError: a text cannot be used; those before it have been answered.
        """
        for arrived in arrivals:
            if self.reads_attention and self.calibration is None:
                self.calibrate([query.text for query in arrived[:CENTRING_TEXTS]])
            waiting: list[tuple[str, prompts.Prompt]] = []
            tokens = 0
            for query in arrived:
                try:
                    prompt = self._prompt(query.text, query.place)
                except PromptError:
                    yield self._answers(waiting)
                    raise
                waiting.append((query.text, prompt))
                tokens += len(prompt.token_ids)
                if tokens >= LOOKAHEAD_BATCHES * self._batch_tokens:
                    yield self._answers(waiting)
                    waiting, tokens = [], 0
            if waiting:
                yield self._answers(waiting)

    def calibrate(self, texts: Sequence[str]) -> None:
        """Set the calibration from texts that are not among the demonstrations.

        Fewer than LEAST_CALIBRATION_TEXTS switch it off, and so do answers of the model that are
        not finite.
        """
        self._calibrate_by(self.raw_of(texts))

    def _calibrate_by(self, raw: np.ndarray) -> None:
        """Set the calibration from texts' (N, C) probabilities without calibration."""
        self.calibration = None
        if len(raw) >= LEAST_CALIBRATION_TEXTS:
            mean = _log(raw).mean(axis=0)
            self.calibration = mean if np.isfinite(mean).all() else None

    def raw_of(self, texts: Sequence[str]) -> np.ndarray:
        """Label probabilities of N texts without calibration, (N, C) float64."""
        return self.raw_probabilities(
            [self._prompt(text, "a text for calibration") for text in texts]
        )

    def raw_probabilities(
        self,
        queries: Sequence[prompts.Prompt],
        on_progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
    ) -> np.ndarray:
        """Label probabilities of N prompts without calibration, (N, C) float64."""
        space = self.builder.space
        if not queries:
            return np.zeros((0, len(space)))
        # Down to the last label all prompts begin alike. A text's first token may take in what
        # stands before it, and every prompt must have a token of its own.
        prefix = self.prefix.token_ids
        shared = common_prefix([prefix, *(prompt.token_ids[:-1] for prompt in queries)])
        if len(shared) < len(prefix):
            self.prefix = Prefix(self.model, shared)
        options: evaluation.Options = {
            "batch_tokens": self._batch_tokens,
            "prefix": self.prefix,
            "on_progress": on_progress,
            "ranks": ranks,
        }
        if self.reads_attention:
            return evaluation.read_out_probabilities(self.model, queries, len(space), **options)
        return evaluation.label_probabilities(self.model, queries, space, **options)

    def calibrated(self, raw: np.ndarray) -> np.ndarray:
        """(N, C) probabilities as the model gives them -> (N, C) calibrated ones."""
        if self.calibration is None and self.temperature == 1:
            return raw
        offsets = 0 if self.calibration is None else self.calibration
        return evaluation.softmax((_log(raw) - offsets) / self.temperature)

    def probabilities(self, queries: Sequence[prompts.Prompt]) -> np.ndarray:
        """Calibrated label probabilities of prompts, (N, C) float64.

        Raises:
            RunError: they are not finite.
        """
        result = self.calibrated(self.raw_probabilities(queries))
        evaluation.check_finite(result)
        return result

    def _answers(self, queries: Sequence[tuple[str, prompts.Prompt]]) -> list[Prediction]:
        """The answers to texts with their prompts."""
        names = self.builder.space.names
        rows = self.probabilities([prompt for _, prompt in queries])
        return [
            Prediction(text, names[row.argmax()], dict(zip(names, row.tolist(), strict=True)))
            for (text, _), row in zip(queries, rows, strict=True)
        ]

    def _prompt(self, text: str, where: str) -> prompts.Prompt:
        """The prompt that asks for a text's label; its gold label is 0, and nobody reads it."""
        return self.builder.build(self.shown(text), text, 0, where=where)

    def _beginning(self) -> tuple[int, ...]:
        """The tokens that prompts begin with, as far as a few queries can tell."""
        if self.nearest is not None:
            return ()
        queries = [*_PROBES, *(text for text, _ in self.demonstrations)]
        tokens: list[tuple[int, ...]] = []
        for number, query in enumerate(queries, 1):
            try:
                tokens.append(self._prompt(query, "a prompt of the demonstrations").token_ids)
            except PromptError:
                if number == len(queries) and not tokens:
                    raise
        return common_prefix(tokens)


def _log(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities, of 0 a large negative number."""
    return np.log(np.maximum(probabilities, 1e-300))


def choose(
    model: nn.Module,
    builder: prompts.PromptBuilder,
    pool: data.LabelledTexts,
    validation: data.LabelledTexts,
    k: int,
    recipe: recipes.Recipe,
    *,
    draws: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Predictor, float | None]:
    """Choose demonstrations for prediction: the best of several balanced sets.

    With ``prompt.selection: nearest`` the demonstrations are all of the pool, of which each text is
    shown the k nearest.

    Args:
        model: as it is to predict.
        builder: of the task's prompts.
        pool: training texts, from which demonstrations and texts for calibration are drawn.
        validation: the texts on which sets are compared; without any the first set is taken.
        k: demonstrations.
        recipe: its prediction section and ``evaluation.seed``.
        draws: sets to try; None means the recipe's.
        on_progress: called with the number of validation prompts done and of all.

    Returns:
        The predictor, and its accuracy on the validation texts if there are any.
    """
    section, seed, tokens = (
        recipe.prediction,
        recipe.evaluation.seed,
        recipe.evaluation.batch_tokens,
    )
    pairs, labelled = pool.pairs(), validation.pairs()[: recipe.training.validation_prompts]
    nearest = recipe.prompt.selection == "nearest"
    count = (draws or section.draws) if labelled and not nearest else 1
    best: tuple[tuple[float, float], Predictor] | None = None
    for number in range(count):
        if nearest:
            predictor = Predictor(model, builder, pairs, tokens, nearest=k)
        else:
            rows = data.balanced(pool.labels, k, random.Random(f"{seed}/{number}"))
            predictor = Predictor(model, builder, [pairs[row] for row in rows], tokens)
        texts = calibration_texts(pool, predictor, section.calibration_texts, seed)
        quality = settle(predictor, texts, labelled)
        if quality is None:
            return predictor, None
        if best is None or quality > best[0]:
            best = quality, predictor
        if on_progress is not None:
            on_progress((number + 1) * len(labelled), count * len(labelled))
    assert best is not None
    return best[1], best[0][0]


def settle(
    predictor: Predictor, texts: Sequence[str], labelled: Sequence[tuple[str, int]]
) -> tuple[float, float] | None:
    """Set a predictor's calibration and temperature.

    The mean is taken over the validation texts, too: they are asked anyway, and with 32 texts it
    is so noisy that a read-out lost 5 points on SST2. Calibration helps a base model, and can hurt
    a trained one whose classes are not equally frequent, so it is kept only if labelled texts are
    better for it. A read-out is always centred, as it was trained.

    Args:
        predictor: changed in place.
        texts: training texts to calibrate with; none switch it off where the LM head answers.
        labelled: validation texts; without any, calibration is kept.

    Returns:
        Accuracy, and mean log-likelihood to decide between equals, on the validation texts.
    """
    if not labelled:
        predictor.calibrate(texts)
        return None
    gold = np.array([label for _, label in labelled])
    raw = predictor.raw_probabilities(predictor.prompts_of(labelled))
    if texts or predictor.reads_attention:
        predictor._calibrate_by(np.concatenate([predictor.raw_of(texts), raw]))

    def quality(probabilities: np.ndarray) -> tuple[float, float]:
        right = (probabilities.argmax(axis=1) == gold).mean()
        return float(right), float(_log(probabilities)[np.arange(len(gold)), gold].mean())

    result = quality(predictor.calibrated(raw))
    if not predictor.reads_attention and quality(raw) > result:
        predictor.calibration, result = None, quality(raw)
    predictor.temperature = evaluation.temperature(predictor.calibrated(raw), gold)
    return result


def calibration_texts(
    pool: data.LabelledTexts, predictor: Predictor, count: int, seed: int
) -> list[str]:
    """At most ``count`` texts of a pool to calibrate with; none that every prompt shows."""
    left_out = {text for text, _ in predictor.demonstrations} if predictor.nearest is None else ()
    others = [text for text in pool.texts if text not in left_out]
    return random.Random(f"{seed}/calibration").sample(others, min(count, len(others)))


@dataclass(frozen=True)
class Shipped:
    """What a run folder stores to predict with: classes, their label words, and a predictor's."""

    names: tuple[str, ...]
    words: tuple[str, ...]
    demonstrations: tuple[tuple[str, int], ...]
    calibration: np.ndarray | None
    nearest: int | None = None
    temperature: float = 1.0

    @classmethod
    def read(cls, folder: Path) -> Shipped | None:
        """Read it from a run folder; None where it was not stored.

        Raises:
            OutputError: its files are damaged.
        """
        path = folder / DEMONSTRATIONS_FILE
        if not path.is_file() or not (folder / "run.json").is_file():
            return None
        try:
            run = files.parse_json((folder / "run.json").read_text(encoding="utf-8"))
            words = {str(name): str(word) for name, word in run["labels"].items()}
            names = list(words)
            # Texts may hold what splitlines takes for the end of a line.
            lines = path.read_text(encoding="utf-8").split("\n")
            rows = [files.parse_json(line) for line in lines if line.strip()]
            shown = tuple((str(row["text"]), names.index(row["label"])) for row in rows)
            stored = run.get("classifier") or {}
            offsets = stored.get("calibration")
            return cls(
                tuple(names),
                tuple(words.values()),
                shown,
                None if offsets is None else np.array([float(offsets[name]) for name in names]),
                int(stored["k"]) if stored.get("nearest") else None,
                float(stored.get("temperature", 1)),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} and run.json do not fit together ({type(error).__name__}: {error}); give "
                "--demonstrations FILE instead, or train again"
            ) from None

    def predictor(
        self, model: nn.Module, builder: prompts.PromptBuilder, batch_tokens: int
    ) -> Predictor:
        """The predictor that was stored, on an open model."""
        stored = self.calibration, self.nearest, self.temperature
        return Predictor(model, builder, self.demonstrations, batch_tokens, *stored)


def write(folder: Path, predictor: Predictor) -> dict[str, Any]:
    """Write ``demonstrations.jsonl``, and return what ``run.json`` holds as ``classifier``.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [json.dumps(shown, ensure_ascii=False) + "\n" for shown in predictor.named()]
    files.write_text(folder / DEMONSTRATIONS_FILE, "".join(lines))
    offsets = None
    if predictor.calibration is not None:
        names = predictor.builder.space.names
        offsets = dict(zip(names, predictor.calibration.tolist(), strict=True))
    return {
        "k": predictor.k,
        "nearest": predictor.nearest is not None,
        "answers": "attention" if predictor.reads_attention else "lm_head",
        "calibration": offsets,
        "temperature": predictor.temperature,
    }


@dataclass(frozen=True)
class Opened:
    """A predictor, its resolved recipe, and where its demonstrations come from."""

    recipe: recipes.Recipe
    predictor: Predictor
    source: str

    def shown(self) -> list[dict[str, str]]:
        """The demonstrations, as they are reported: text and label."""
        return self.predictor.named()

    def missing(self) -> list[str]:
        """Classes that no demonstration has."""
        names = self.predictor.builder.space.names
        return sorted(set(names) - {shown["label"] for shown in self.shown()})


def class_names(
    section: recipes.DataSection, adapter: adapters.Named | None = None
) -> tuple[str, ...]:
    """The classes of a run, or of a recipe's data: those that it lists, or that its texts have."""
    shipped = None if adapter is None else Shipped.read(adapters.local_folder(adapter))
    return shipped.names if shipped else tuple(section.labels or data.load(section).names)


def read_demonstrations(
    section: recipes.DataSection, source: str, names: Sequence[str]
) -> data.LabelledTexts:
    """Read a file of labelled texts to show; ``names`` are the classes, in order."""
    changes = {"source": source, "labels": list(names), "config": None, "split": "train"}
    return data.load(section.model_copy(update=changes))


def prepare(
    recipe: recipes.Recipe,
    adapter: adapters.Named | None = None,
    demonstrations: str | data.LabelledTexts | None = None,
) -> Opened:
    """Open what a recipe names for prediction.

    A run folder brings its own demonstrations, label words and calibration, and its data are not
    read. Otherwise balanced demonstrations are chosen from the data's training part.

    Args:
        recipe: names model, data, prompts and the seed that chooses demonstrations.
        adapter: a run folder, adapter folder or hub id of what to put on the model.
        demonstrations: labelled texts, or a file of them, all shown, in order, uncalibrated.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    recipe = recipes.resolve(recipe)
    section, tokens = recipes.task(recipe), recipe.evaluation.batch_tokens
    source = None if adapter is None else adapters.find(adapter)
    shipped = None if source is None else Shipped.read(source.folder)
    if shipped is not None:
        section = with_words(section, shipped)
    # Texts first: a model may have to be downloaded.
    texts = splits = None
    if isinstance(demonstrations, str):
        names = shipped.names if shipped is not None else class_names(section.data)
        demonstrations = read_demonstrations(section.data, demonstrations, names)
    if demonstrations is not None:
        names = demonstrations.names
    elif shipped is not None:
        names = shipped.names
    else:
        texts = _texts_of(section.data, source)
        names, splits = texts.names, data.split(texts, section.data, least_demonstrations(section))
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=source)
    builder = prompt_builder(section, names, loaded.tokenizer, loaded.context_tokens)
    if demonstrations is not None:
        predictor = Predictor(loaded.model, builder, demonstrations.pairs(), tokens)
        return Opened(recipe, predictor, demonstrations.source)
    if shipped is not None and source is not None:
        predictor = shipped.predictor(loaded.model, builder, tokens)
        return Opened(recipe, predictor, str(source.folder / DEMONSTRATIONS_FILE))
    assert texts is not None
    assert splits is not None
    k, _ = demonstrations_that_fit(section, splits.training, builder)
    predictor, _ = choose(loaded.model, builder, splits.training, splits.validation, k, recipe)
    return Opened(recipe, predictor, texts.source)


def _texts_of(section: recipes.DataSection, source: adapters.Source | None) -> data.LabelledTexts:
    """The recipe's texts, for an adapter that comes without demonstrations."""
    try:
        return data.load(section)
    except DataError as error:
        if source is None or Path(section.source).exists():
            raise
        raise DataError(
            f"adapter {source} has no {DEMONSTRATIONS_FILE}, and its data, {section.source}, "
            "cannot be read here; give labelled texts with --demonstrations FILE"
        ) from error


def with_words(section: recipes.TaskSection, shipped: Shipped) -> recipes.TaskSection:
    """A task with the classes and label words that a run stored.

    Raises:
        PromptError: the task names other classes or words, which the run was not trained with.
    """
    names, words = list(shipped.names), list(shipped.words)
    chosen = section.prompt.label_words
    if section.data.labels not in (None, [], names):
        raise PromptError(
            f"data.labels is {first_few(section.data.labels or ())}, and the labels of this run "
            f"are {first_few(names)}: leave it (--labels) out"
        )
    if chosen is not None and prompts.words_of(names, chosen) != words:
        raise PromptError(
            f"prompt.label_words is not what this run was trained with, {first_few(words)}: leave "
            "it (--label-words) out, or train again"
        )
    label_words = dict(zip(names, words, strict=True))
    return section.model_copy(
        update={
            "data": section.data.model_copy(update={"labels": names}),
            "prompt": section.prompt.model_copy(update={"label_words": label_words}),
        }
    )
