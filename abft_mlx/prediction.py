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
from abft_mlx.prefix import AttendedPrefix, Prefix, common_prefix
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

    A model with a read-out (:mod:`abft_mlx.read_out`) answers from the attention to the
    demonstrations' labels, any other with its LM head.

    Attributes:
        model: as it was given.
        builder: makes the prompts; counts the texts that it shortened.
        demonstrations: the K pairs of text and class number that every prompt shows.
        prefix: what is cached of them, computed anew if a text turns up whose first token takes in
            what stands before it; empty for models whose prompts must be computed whole.
        nearest: how many of the demonstrations each text is shown; None means all.
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
        """Compute what all prompts share.

        Args:
            model: a loaded model, which is not to change from now on.
            builder: of the task's prompts.
            demonstrations: K pairs of text and class number.
            batch_tokens: tokens in one batch, padding and cached ones included.
            calibration: (C,) mean log-probabilities to subtract, or None.
            nearest: show so many demonstrations to each text, those most similar to it, instead of
                all; prompts then share nothing.
            temperature: as the attribute.

        Raises:
            PromptError: the demonstrations make no prompt.
        """
        self.builder = builder
        self.demonstrations = tuple(demonstrations)
        self.model = model
        self.calibration = calibration
        self.temperature = temperature
        self.nearest = nearest
        shown = [text for text, _ in self.demonstrations]
        self._nearest = None if nearest is None else data.Nearest(shown)
        self._folded = [] if nearest is None else [data.fold(text) for text in shown]
        self._batch_tokens = batch_tokens
        self.reads_attention = read_out.of(model) is not None
        self.prefix: Prefix | AttendedPrefix = self._computed(self._shared())

    def predict(self, arrivals: Iterable[Sequence[data.Query]]) -> Iterator[list[Prediction]]:
        """Answers in the order of the texts, a list as soon as it is there.

        No more is read than is about to be answered, and never more than LOOKAHEAD_BATCHES batches
        are kept, so that memory is bounded however many texts come. A read-out that has not been
        centred is centred by the first texts, if at least LEAST_CALIBRATION_TEXTS arrive at once.

        Args:
            arrivals: lists of texts, each of those that are there at once.

        Raises:
            UsageError: a text cannot be used; those before it have been answered.
        """
        for arrived in arrivals:
            if self.reads_attention and self.calibration is None:
                self.calibrate([query.text for query in arrived[:CENTRING_TEXTS]])
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

    @property
    def k(self) -> int:
        """Demonstrations in a prompt."""
        return self.nearest or len(self.demonstrations)

    def shown(self, text: str) -> list[tuple[str, int]]:
        """The demonstrations of a text's prompt; never the text itself, whatever its case."""
        if self._nearest is None or self.nearest is None:
            return list(self.demonstrations)
        folded = data.fold(text)
        same = [row for row, other in enumerate(self._folded) if other == folded]
        return [self.demonstrations[row] for row in self._nearest.rows(text, self.nearest, same)]

    def calibrate(self, texts: Sequence[str]) -> None:
        """Set the calibration from texts that are not among the demonstrations.

        Args:
            texts: some training texts; fewer than LEAST_CALIBRATION_TEXTS switch it off, and so
                do answers of the model that are not finite.
        """
        self.calibrate_by(self.raw_of(texts))

    def calibrate_by(self, raw: np.ndarray) -> None:
        """As :meth:`calibrate`, from texts' (N, C) probabilities without calibration."""
        self.calibration = None
        if len(raw) >= LEAST_CALIBRATION_TEXTS:
            found = _log(raw).mean(axis=0)
            self.calibration = found if np.isfinite(found).all() else None

    def raw_of(self, texts: Sequence[str]) -> np.ndarray:
        """Label probabilities of N texts without calibration, (N, C) float64."""
        if not texts:
            return np.zeros((0, len(self.builder.space)))
        return self.raw_probabilities(
            [self._prompt(text, "a text for calibration") for text in texts]
        )

    def probabilities(self, asked: Sequence[prompts.Prompt]) -> np.ndarray:
        """Calibrated label probabilities of prompts, (N, C) float64.

        Raises:
            RunError: they are not finite.
        """
        found = self.calibrated(self.raw_probabilities(asked))
        evaluation.check_finite(found)
        return found

    def calibrated(self, raw: np.ndarray) -> np.ndarray:
        """(N, C) probabilities as the model gives them -> (N, C) calibrated ones."""
        if self.calibration is None and self.temperature == 1:
            return raw
        offsets = 0 if self.calibration is None else self.calibration
        return evaluation.softmax((_log(raw) - offsets) / self.temperature)

    def raw_probabilities(
        self,
        asked: Sequence[prompts.Prompt],
        on_progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
    ) -> np.ndarray:
        """Label probabilities without calibration, (N, C) float64.

        Args:
            asked: N prompts.
            on_progress: called with the number of prompts done and of all.
            ranks: the processes that compute together; each gets all.
        """
        self._shorten(asked)
        if isinstance(self.prefix, AttendedPrefix):
            return evaluation.read_out_probabilities(
                self.model,
                asked,
                len(self.builder.space),
                batch_tokens=self._batch_tokens,
                prefix=self.prefix,
                on_progress=on_progress,
                ranks=ranks,
            )
        return evaluation.label_probabilities(
            self.model,
            asked,
            self.builder.space,
            batch_tokens=self._batch_tokens,
            prefix=self.prefix,
            on_progress=on_progress,
            ranks=ranks,
        )

    def prompts_of(self, pairs: Iterable[tuple[str, int]]) -> list[prompts.Prompt]:
        """Prompts of labelled texts, to measure with.

        Args:
            pairs: N texts and class numbers.
        """
        return [
            self.builder.build(
                self.shown(pair[0]), *pair, where=getattr(pair, "place", f"text {n}")
            )
            for n, pair in enumerate(pairs, 1)
        ]

    def _answers(self, asked: Sequence[tuple[data.Query, prompts.Prompt]]) -> list[Prediction]:
        """The answers to prompts."""
        names = self.builder.space.names
        chosen = [prompt for _, prompt in asked]
        found = self.probabilities(chosen)
        return [
            Prediction(query.text, names[row.argmax()], dict(zip(names, row.tolist(), strict=True)))
            for (query, _), row in zip(asked, found, strict=True)
        ]

    def _prompt(self, text: str, where: str) -> prompts.Prompt:
        """The prompt that asks for a text's label."""
        # Nothing here looks at the gold label, which nobody knows.
        return self.builder.build(self.shown(text), text, 0, where=where)

    def _shorten(self, asked: Sequence[prompts.Prompt]) -> None:
        """Have a prefix that these prompts begin with; down to the last label, all of them do."""
        kept = self.prefix.token_ids
        shared = common_prefix([kept, *(prompt.token_ids for prompt in asked)])
        if len(shared) < len(kept):
            self.prefix = self._computed(shared)

    def _computed(self, token_ids: Sequence[int]) -> Prefix | AttendedPrefix:
        """A prefix of these tokens."""
        return (AttendedPrefix if self.reads_attention else Prefix)(self.model, token_ids)

    def _shared(self) -> tuple[int, ...]:
        """The tokens that prompts begin with, as far as a few texts can tell."""
        if self.nearest is not None:
            return ()
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
    section, seed = recipe.prediction, recipe.evaluation.seed
    pairs, asked = pool.pairs(), validation.pairs()[: recipe.training.validation_prompts]
    best: tuple[tuple[float, float], Predictor] | None = None
    nearest = recipe.prompt.selection == "nearest"
    count = (draws or section.draws) if asked and not nearest else 1
    tokens = recipe.evaluation.batch_tokens
    for number in range(count):
        if nearest:
            made = Predictor(model, builder, pairs, tokens, nearest=k)
        else:
            rows = data.balanced(pool.labels, k, random.Random(f"{seed}/{number}"))
            made = Predictor(model, builder, [pairs[row] for row in rows], tokens)
        quality = settle(
            made, calibration_texts(pool, made, section.calibration_texts, seed), asked
        )
        if quality is None:
            return made, None
        if best is None or quality > best[0]:
            best = quality, made
        if on_progress is not None:
            on_progress((number + 1) * len(asked), count * len(asked))
    assert best is not None
    return best[1], best[0][0]


def settle(
    predictor: Predictor, texts: Sequence[str], asked: Sequence[tuple[str, int]]
) -> tuple[float, float] | None:
    """Set a predictor's calibration and temperature.

    The mean is taken over the validation texts, too: they are asked anyway, and with 32 texts it
    is so noisy that a read-out lost 5 points on SST2. Calibration helps a base model, and can hurt
    a trained one whose classes are not equally frequent, so it is kept only if labelled texts are
    better for it. A read-out is always centred, as it was trained.

    Args:
        predictor: changed in place.
        texts: training texts to calibrate with; none switch it off where the LM head answers.
        asked: labelled validation texts; without any, calibration is kept.

    Returns:
        Accuracy, and mean log-likelihood to decide between equals, on the validation texts.
    """
    if not asked:
        predictor.calibrate(texts)
        return None
    gold = np.array([label for _, label in asked])
    raw = predictor.raw_probabilities(predictor.prompts_of(asked))
    if texts or predictor.reads_attention:
        predictor.calibrate_by(np.concatenate([predictor.raw_of(texts), raw]))
    quality, without = _quality(predictor.calibrated(raw), gold), _quality(raw, gold)
    if without > quality and not predictor.reads_attention:
        predictor.calibration, quality = None, without
    predictor.temperature = evaluation.temperature(predictor.calibrated(raw), gold)
    return quality


def _quality(probabilities: np.ndarray, gold: np.ndarray) -> tuple[float, float]:
    """Accuracy, and mean log-likelihood to decide between equals."""
    right = (probabilities.argmax(axis=1) == gold).mean()
    return float(right), float(_log(probabilities)[np.arange(len(gold)), gold].mean())


def calibration_texts(
    pool: data.LabelledTexts, predictor: Predictor, count: int, seed: int
) -> list[str]:
    """Texts to calibrate a predictor with, drawn by a seed.

    Args:
        pool: the texts to draw from.
        predictor: whose demonstrations are left out, where every prompt shows them.
        count: of texts; fewer where the pool has fewer.
        seed: of the draw.
    """
    left_out = {text for text, _ in predictor.demonstrations} if predictor.nearest is None else ()
    others = [text for text in pool.texts if text not in left_out]
    return random.Random(f"{seed}/calibration").sample(others, min(count, len(others)))


@dataclass(frozen=True)
class Shipped:
    """What a run folder stores to predict with.

    Attributes:
        names: the classes, in order.
        words: the label word of each.
        demonstrations: K pairs of text and class number.
        calibration: (C,) mean log-probabilities to subtract, or None.
        nearest: how many of the demonstrations each text is shown; None means all.
        temperature: of the probabilities.
    """

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
            if not isinstance(run, dict):
                raise OutputError(f"{folder / 'run.json'}: not a JSON object; train again")
            words = {str(name): str(word) for name, word in run["labels"].items()}
            # Texts may hold what splitlines takes for the end of a line.
            lines = path.read_text(encoding="utf-8").split("\n")
            rows = [files.parse_json(line) for line in lines if line.strip()]
            names = list(words)
            shown = tuple((str(row["text"]), names.index(row["label"])) for row in rows)
            classifier = run.get("classifier") or {}
            nearest = int(classifier["k"]) if classifier.get("nearest") else None
            found = classifier.get("calibration")
            temperature = float(classifier.get("temperature", 1))
            offsets = None if found is None else np.array([float(found[name]) for name in names])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} and run.json do not fit together ({type(error).__name__}: {error}); give "
                "--demonstrations FILE instead, or train again"
            ) from None
        return cls(tuple(words), tuple(words.values()), shown, offsets, nearest, temperature)

    def predictor(
        self, model: nn.Module, builder: prompts.PromptBuilder, batch_tokens: int
    ) -> Predictor:
        """The predictor that was stored, on an open model."""
        return Predictor(
            model,
            builder,
            self.demonstrations,
            batch_tokens,
            self.calibration,
            self.nearest,
            self.temperature,
        )


def write_demonstrations(folder: Path, predictor: Predictor) -> None:
    """Write ``demonstrations.jsonl``: a JSON object with text and label in each line.

    Raises:
        OutputError: it cannot be written.
    """
    names = predictor.builder.space.names
    lines = (
        json.dumps({"text": text, "label": names[label]}, ensure_ascii=False) + "\n"
        for text, label in predictor.demonstrations
    )
    files.write_text(folder / DEMONSTRATIONS_FILE, "".join(lines))


def facts(predictor: Predictor) -> dict[str, Any]:
    """What ``run.json`` holds of a predictor as ``classifier``.

    Returns:
        ``k``; ``nearest``, whether each text is shown its own k of the demonstrations;
        ``answers``, attention or lm_head; ``calibration``, label to mean log-probability, or None;
        and ``temperature``.
    """
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
    """A predictor, and what it was made of.

    Attributes:
        recipe: the resolved recipe.
        predictor: ready to predict.
        source: where the demonstrations come from.
    """

    recipe: recipes.Recipe
    predictor: Predictor
    source: str

    def shown(self) -> list[dict[str, Any]]:
        """The demonstrations, as they are reported: text and label."""
        names = self.predictor.builder.space.names
        return [
            {"text": text, "label": names[label]} for text, label in self.predictor.demonstrations
        ]

    def missing(self) -> list[str]:
        """Classes that no demonstration has."""
        names = self.predictor.builder.space.names
        return sorted(set(names) - {shown["label"] for shown in self.shown()})


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

    A run folder brings its own demonstrations, label words and calibration, and its data are not
    read. Otherwise balanced demonstrations are chosen from the data's training part.

    Args:
        recipe: names model, data, prompts and the seed that chooses demonstrations.
        adapter: a run folder, adapter folder or hub id of what to put on the model.
        demonstrations: labelled texts, or a file of them, all of which are shown, in order, without
            calibration.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    recipe = recipes.resolve(recipe)
    source = None if adapter is None else adapters.find(adapter)
    shipped = None if source is None else Shipped.read(source.folder)
    section = recipes.task(recipe)
    texts = splits = None
    if shipped is not None:
        section = with_words(section, shipped)
        names: Sequence[str] = shipped.names
    if isinstance(demonstrations, str):
        known = shipped.names if shipped is not None else class_names(section.data)
        demonstrations = read_demonstrations(section.data, demonstrations, known)
    if demonstrations is not None:
        names = demonstrations.names
    elif shipped is None:
        texts = _texts_of(section.data, source)
        names, splits = texts.names, data.split(texts, section.data, least_demonstrations(section))
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=source)
    builder = prompt_builder(section, names, loaded.tokenizer, loaded.context_tokens)
    tokens = recipe.evaluation.batch_tokens
    if demonstrations is not None:
        predictor = Predictor(loaded.model, builder, demonstrations.pairs(), tokens)
        return Opened(recipe, predictor, demonstrations.source)
    if shipped is not None:
        assert source is not None
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
    asked = section.data.labels or list(shipped.names), section.prompt.label_words
    if asked[0] != list(shipped.names):
        raise PromptError(
            f"data.labels is {first_few(asked[0])}, and the labels of this run are "
            f"{first_few(shipped.names)}: leave it (--labels) out"
        )
    if asked[1] is not None and prompts.words_of(shipped.names, asked[1]) != list(shipped.words):
        raise PromptError(
            "prompt.label_words is not what this run was trained with, "
            f"{first_few(shipped.words)}: leave it (--label-words) out, or train again"
        )
    words = dict(zip(shipped.names, shipped.words, strict=True))
    return section.model_copy(
        update={
            "data": section.data.model_copy(update={"labels": list(shipped.names)}),
            "prompt": section.prompt.model_copy(update={"label_words": words}),
        }
    )


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
    return Opened(recipe, predictor, demonstrations.source)
