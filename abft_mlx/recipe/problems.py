"""Pydantic's findings in one line: the key, its value, and the closest key that exists."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import Annotated, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from abft_mlx.recipe.sections import Recipe

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 200, 200
_COUNT = "a whole number of at least 1, or auto, is needed"
# What to say instead of the complaints of each member of a union.
_NEEDED = {
    "prompt.label_words": "a map from labels to words, letters, auto, or null is needed",
    "prompt.demonstrations": _COUNT,
    "training.shared_demonstrations": _COUNT,
    "training.micro_batch_tokens": _COUNT,
    "adapter.layers": "a list of layer numbers such as [4, 5], auto, or null for all is needed",
}
_UNION_ERRORS = ("int_parsing", "int_type", "literal_error", "list_type", "dict_type")


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that looks most like a word, if any does."""
    return next(iter(difflib.get_close_matches(word, list(candidates), n=1)), None)


def short(value: object) -> str:
    """A value as a message shows it, cut where it is long."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def section_of(name: str, model: type[BaseModel] = Recipe) -> type[BaseModel] | None:
    """The model that a field, or each entry of a field that is a list, holds."""
    field = model.model_fields.get(name)
    annotation: object = field.annotation if field else None
    while get_origin(annotation) in (list, Annotated):
        annotation = get_args(annotation)[0]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_model else None  # type: ignore[return-value]


def is_text(path: Sequence[str]) -> bool:
    """Whether the setting at this path takes a text and nothing else (or null)."""
    model: type[BaseModel] | None = Recipe
    for key in path[:-1]:
        model = section_of(key, model) if model else None
    field = model.model_fields.get(path[-1]) if model else None
    return field is not None and field.annotation in (str, str | None)


def describe(error: ValidationError, root: type[BaseModel] = Recipe) -> str:
    """The first problem in a line, and the others in brackets."""
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        model, keys = root, []
        for item in detail["loc"]:  # without pydantic's names for union members
            keys.append(str(item))
            if isinstance(item, str):
                inner = section_of(item, model)
                if inner is None:
                    break
                model = inner
        path = ".".join(keys)
        lines.setdefault(path, _line(path, model, root, detail))  # a union reports all members
    first, *more = lines.values()
    return first + (f" (and {len(more)} more: {'; '.join(more)})" if more else "")


def _line(path: str, model: type[BaseModel], root: type[BaseModel], detail: ErrorDetails) -> str:
    """One problem: which key, which value, what is needed."""
    key, value = path.rpartition(".")[2], detail["input"]
    if detail["type"] == "extra_forbidden":
        near = closest(key, model.model_fields) or (_elsewhere(key) if root is Recipe else None)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(model.model_fields)}"
        return f"unknown key {path} (value {short(value)}); {hint}"
    if detail["type"] == "missing":
        return f"{path} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if detail["type"] == "value_error" and isinstance(value, dict):
        # Settings that do not fit each other: the message names them.
        return f"{path}: {message}" if path else message
    if path in _NEEDED and detail["type"] in _UNION_ERRORS:
        message = _NEEDED[path]
    if detail["type"] == "model_type":
        message = "a map of settings is needed"
    if isinstance(value, bool):
        message += "; YAML reads an unquoted true or false as a flag, so quote it if it is a word"
    return f"{path} is {short(value)}: {message}"


def _elsewhere(key: str) -> str | None:
    """Where a key that was put into the wrong section belongs."""
    for name in sorted(Recipe.model_fields):
        inner = section_of(name)
        if inner is not None and key in inner.model_fields:
            return f"{name}.{key}"
    return key if key in Recipe.model_fields else None
