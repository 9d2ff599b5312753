"""A few-shot classifier as a scikit-learn estimator: ``fit``, ``predict``, ``predict_proba``.

Letters: N texts, C classes, K demonstrations.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from abft_mlx import adapters, data, experiment, files, prediction
from abft_mlx import recipe as recipes
from abft_mlx.errors import DataError, NotFittedError, OutputError, UsageError
from abft_mlx.events import OnUpdate, Update
from abft_mlx.trainer import SCHEMA, Progress

_TEXTS, _LABELS, _SHOWN = "X", "y", "demonstrations"


@dataclass(frozen=True)
class _Ready:
    """What answers, and its classes as the user calls them."""

    opened: prediction.Opened
    classes: np.ndarray
    columns: tuple[str, ...]
    progress: Progress | None = None


class Classifier:
    """A language model with an adapter and demonstrations, as an estimator of scikit-learn.

    With an adapter or demonstrations it predicts at once, exactly as ``abft-mlx predict`` does;
    :meth:`fit` trains an adapter and chooses demonstrations. It follows scikit-learn's
    conventions without needing scikit-learn: ``clone``, ``cross_val_score`` and ``GridSearchCV``
    take it.

    ::

        >>> import abft_mlx
        >>> shown = [
        ...     ("the sink leaks water", "urgent"), ("a chair was delivered", "routine"),
        ...     ("the heater exploded", "urgent"), ("please repaint the fence", "routine"),
        ... ]
        >>> classifier = abft_mlx.Classifier("demo", demonstrations=shown)
        >>> classifier.classes_.tolist()
        ['routine', 'urgent']
        >>> classifier.predict_proba(["smoke fills the hall"]).shape
        (1, 2)

    Args:
        model: ``demo`` for the bundled one, a local folder, or a hub id; None for the recipe's.
        adapter: a run folder, an adapter folder of mlx-lm or PEFT, or a hub id. A run's own recipe
            is used where ``recipe`` is None.
        demonstrations: what every prompt shows, in order: pairs of text and label, or a file as
            ``abft-mlx predict --demonstrations`` takes it. None lets :meth:`fit` choose; without
            a fit they are those of the run folder, or chosen from the recipe's data.
        recipe: a recipe, the name of one that ships, or a .yaml file. Of its data :meth:`fit`
            uses only sizes and seeds. None is the one for own texts, ``your-data``.
        overrides: ``section.key=value`` each, such as ``training.updates=64``.
        label_words: the word that stands for each label in a prompt; None leaves it to the
            recipe, whose default is the label itself.
        train: False makes :meth:`fit` only choose demonstrations: prompting without training, to
            compare with, or with an adapter that is there already.
        on_update: told of every optimizer update of :meth:`fit`.
    """

    # What versions of scikit-learn before 1.6 look for.
    _estimator_type = "classifier"
    _fitted: _Ready | None = None
    _opened: tuple[dict[str, Any], _Ready] | None = None

    def __init__(
        self,
        model: str | None = None,
        adapter: str | Path | None = None,
        demonstrations: str | Path | Sequence[tuple[str, Hashable]] | None = None,
        *,
        recipe: recipes.Recipe | str | Path | None = None,
        overrides: Sequence[str] = (),
        label_words: Mapping[Any, str] | Literal["auto"] | None = None,
        train: bool = True,
        on_update: Callable[[Update], None] | None = None,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.demonstrations = demonstrations
        self.recipe = recipe
        self.overrides = overrides
        self.label_words = label_words
        self.train = train
        self.on_update = on_update

    def fit(self, X: Iterable[str], y: Iterable[Hashable]) -> Classifier:
        """Train an adapter on labelled texts, and choose what prompts show.

        Up to ``data.training_rows`` of the texts train; ``data.validation_rows`` of them choose
        the best adapter and the best of several balanced sets of demonstrations, unless those
        were given.

        Args:
            X: N texts: a list, an array of one dimension, a column of a table.
            y: N labels: words, whole numbers or truth values.

        Returns:
            The classifier itself.

        Raises:
            UsageError: texts, labels or parameters cannot be used; one line that says why.
            RunError: training could not go on.
        """
        texts, labels = data.listed(X, _TEXTS), data.listed(y, _LABELS)
        classes, names = _classes_of(labels)
        labelled = data.given(texts, labels, names, _TEXTS, self._recipe().data.empty_texts)
        if self.train and self.adapter is not None:
            raise UsageError(
                f"adapter {str(self.adapter)!r} is given and fit would train another one; set "
                "train=False to keep it, or adapter=None"
            )
        opened = experiment.open_texts(self._recipe(), labelled, self.adapter)
        shown = self._shown(names)
        progress = None
        if self.train:
            opened, progress = experiment.fit(opened, OnUpdate(self.on_update))
        if shown is None:
            choose = experiment.choose_trained if self.train else experiment.choose
            predictor, _ = choose(opened)
        else:
            tokens = opened.recipe.evaluation.batch_tokens
            model, builder = opened.loaded.model, opened.task.builder
            predictor = prediction.Predictor(model, builder, shown.pairs(), tokens)
        source = opened.task.texts.source if shown is None else shown.source
        result = prediction.Opened(opened.recipe, predictor, source)
        self._fitted = _Ready(result, classes, names, progress)
        return self

    def predict_proba(self, X: Iterable[str]) -> np.ndarray:
        """Probabilities of the classes, (N, C) float64 in the order of ``classes_``.

        Args:
            X: N texts.

        Raises:
            NotFittedError: there is nothing to show and nothing was fitted.
            UsageError: a text cannot be used.
            RunError: the model's probabilities are not finite.
        """
        ready = self._ready()
        queries = data.queries_of(data.listed(X, _TEXTS), _TEXTS)
        rows = [
            [answer.probabilities[name] for name in ready.columns]
            for answers in ready.opened.predictor.predict([queries])
            for answer in answers
        ]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(ready.columns))

    def predict(self, X: Iterable[str]) -> np.ndarray:
        """The most probable class of each text, (N,) of the type of ``classes_``.

        Raises what :meth:`predict_proba` does.
        """
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def score(
        self,
        X: Iterable[str],
        y: Iterable[Hashable],
        sample_weight: Iterable[float] | None = None,
    ) -> float:
        """Share of texts whose class is predicted rightly, in 0..1.

        Args:
            X: N texts.
            y: N labels.
            sample_weight: how much each text counts; None: all alike.

        Raises:
            UsageError: as :meth:`predict`, or texts and labels do not fit together.
        """
        labels, gold = self.predict(X).tolist(), data.listed(y, _LABELS)
        if len(labels) != len(gold) or not labels:
            raise DataError(
                f"X has {len(labels)} texts and y {len(gold)} labels; give one for each"
            )
        right = [label == other for label, other in zip(labels, gold, strict=True)]
        weights = None if sample_weight is None else data.listed(sample_weight, "sample_weight")
        return float(np.average(right, weights=weights))

    @property
    def classes_(self) -> np.ndarray:
        """(C,) the labels, sorted: those given to :meth:`fit`, of their own type, or names."""
        return self._ready().classes

    @property
    def demonstrations_(self) -> list[tuple[str, Any]]:
        """The K pairs of text and label that every prompt shows."""
        ready = self._ready()
        labels = dict(zip(ready.columns, ready.classes.tolist(), strict=True))
        return [(shown["text"], labels[shown["label"]]) for shown in ready.opened.shown()]

    @property
    def recipe_(self) -> recipes.Recipe:
        """The resolved recipe."""
        return self._ready().opened.recipe

    @property
    def progress_(self) -> Progress | None:
        """Updates, seconds, validations and peak memory of :meth:`fit`; None without training."""
        return self._ready().progress

    def save(self, folder: str | Path) -> None:
        """Keep what :meth:`fit` trained and chose, for other programs and for later.

        The folder gets ``adapters.safetensors`` and ``adapter_config.json``, which stock mlx-lm
        loads, and what prediction needs. ``Classifier(adapter=folder)`` and ``abft-mlx predict
        FOLDER`` predict the same, by labels' names.

        Args:
            folder: made if it does not exist; it must be empty.

        Raises:
            NotFittedError: nothing was trained.
            OutputError: the folder cannot be written, or holds something.
        """
        ready = self._fitted
        if ready is None or ready.progress is None:
            raise NotFittedError("nothing was trained yet, so there is nothing to save; call fit")
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: exists and is no empty folder; choose another")
        recipe, predictor = ready.opened.recipe, ready.opened.predictor
        space = predictor.builder.space
        adapters.save(predictor.model, folder, base_model=recipe.model)
        run = {
            "schema": SCHEMA,
            "finished": True,
            "labels": dict(zip(space.names, space.words, strict=True)),
            "classifier": prediction.write(folder, predictor),
        }
        files.write_json(folder / "run.json", run)
        changes = {
            "source": prediction.DEMONSTRATIONS_FILE,
            "labels": list(ready.columns),
            "text": "text",
            "label": "label",
        }
        section = recipe.data.model_copy(update=changes)
        recipes.save(recipe.model_copy(update={"data": section}), folder / "recipe.yaml")

    @classmethod
    def _parameters(cls) -> list[str]:
        """Names of the arguments of ``__init__``, which are kept under their own names."""
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters as they were given; ``deep`` has no effect."""
        del deep
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self, **parameters: Any) -> Classifier:
        """Change parameters; what was fitted stays until the next :meth:`fit`.

        Raises:
            ValueError: no such parameter.
        """
        names = self._parameters()
        for name in parameters:
            if name not in names:
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r}; there are {', '.join(names)}"
                )
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """Scikit-learn's description of an estimator: a classifier of texts."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(one_d_array=True, two_d_array=False, string=True),
        )

    def __repr__(self) -> str:
        """The parameters that are not the defaults."""
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if value is not defaults[name].default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_is_fitted__(self) -> bool:
        """Whether it can predict."""
        return self._fitted is not None or self._has_classes()

    def __getstate__(self) -> dict[str, Any]:
        """Parameters alone where nothing was fitted, so that other processes can be given it.

        Raises:
            TypeError: it was fitted, and models are not pickled.
        """
        if self._fitted is not None:
            raise TypeError(
                "a fitted Classifier is not pickled with its model; keep it with save(folder)"
            )
        return self.get_params()

    def _ready(self) -> _Ready:
        """What answers: fitted, or opened from the parameters as they are now."""
        if self._fitted is not None:
            return self._fitted
        parameters = self.get_params()
        if self._opened is not None and self._opened[0] == parameters:
            return self._opened[1]
        if not self._has_classes():
            raise NotFittedError(
                "this Classifier knows no classes yet: call fit(texts, labels), or give "
                "demonstrations, a recipe, or as adapter a run folder with its recipe.yaml"
            )
        ready = self._open()
        # A copy: the caller may change the list.
        self._opened = (copy.deepcopy(parameters), ready)
        return ready

    def _has_classes(self) -> bool:
        """Whether the parameters alone say which classes there are and what is shown."""
        return self.demonstrations is not None or self._recipe_source() is not None

    def _recipe_source(self) -> recipes.Recipe | str | Path | None:
        """The recipe that is named, or that lies with the adapter."""
        if self.recipe is None and self.adapter is not None:
            beside = adapters.local_folder(self.adapter) / "recipe.yaml"
            return beside if beside.is_file() else None
        return self.recipe

    def _recipe(self) -> recipes.Recipe:
        """The recipe with the other parameters applied."""
        named = self._recipe_source()
        changes = [] if self.model is None else [recipes.override("model", self.model)]
        if self.label_words is not None:
            words: Any = self.label_words
            if isinstance(words, Mapping):
                words = {data.word(label): chosen for label, chosen in words.items()}
            changes.append(recipes.override("prompt.label_words", words))
        if named is None and isinstance(self.demonstrations, (str, Path)):
            changes.append(recipes.override("data.source", str(self.demonstrations)))
        changes += self.overrides
        if isinstance(named, recipes.Recipe):
            return recipes.change(named, changes, "overrides")
        return recipes.own_data(changes) if named is None else recipes.load(named, changes)

    def _open(self) -> _Ready:
        """What the parameters alone describe, opened."""
        recipe = self._recipe()
        if self._recipe_source() is None and not isinstance(self.demonstrations, (str, Path)):
            classes, names = _classes_of([label for _, label in self._pairs()])
            columns = names
        else:
            # In the recipe's order, so that words chosen for them are those of abft-mlx predict.
            names = prediction.class_names(recipe.data, self.adapter)
            columns = tuple(sorted(names))
            classes = np.array(columns)
        opened = prediction.prepare(recipe, self.adapter, self._shown(names))
        return _Ready(opened, classes, columns)

    def _shown(self, names: Sequence[str]) -> data.LabelledTexts | None:
        """The demonstrations that were given, checked; None where none were."""
        if self.demonstrations is None:
            return None
        if isinstance(self.demonstrations, (str, Path)):
            section = self._recipe().data
            return prediction.read_demonstrations(section, str(self.demonstrations), names)
        texts, labels = zip(*self._pairs(), strict=True)
        return data.given(texts, labels, names, _SHOWN)

    def _pairs(self) -> list[tuple[Any, Any]]:
        """The demonstrations as pairs of text and label."""
        pairs = data.listed(self.demonstrations, _SHOWN)
        for number, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise DataError(
                    f"demonstrations item {number} is {pair!r:.60}; give pairs of text and label"
                )
        if not pairs:
            raise DataError("demonstrations is empty; give pairs of text and label, or None")
        return [(text, label) for text, label in pairs]


def _classes_of(labels: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The classes as their users call them, sorted, and their names in the same order."""
    named: dict[str, Any] = {}
    for label in labels:
        first = named.setdefault(data.word(label), label)
        if first != label:
            raise DataError(
                f"labels {first!r} and {label!r} have the same name; make them the same"
            )
    kinds = (str, bool)
    if len({tuple(isinstance(label, kind) for kind in kinds) for label in named.values()}) > 1:
        shown = ", ".join(repr(label) for label in list(named.values())[:4])
        raise DataError(f"labels of several kinds ({shown}); make them all words")
    order = sorted(named, key=lambda name: named[name])
    return np.array([named[name] for name in order]), tuple(order)
