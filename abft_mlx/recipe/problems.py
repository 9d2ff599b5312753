"""Pydantic's findings in one line: the key, the value seen, and the closest key that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from abft_mlx.recipe.sections import Recipe

_OR_AUTO = (
    "prompt.demonstrations",
    "training.shared_demonstrations",
    "training.micro_batch_tokens",
)


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like this one, if any does."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def sections() -> set[str]:
    """The keys of a recipe that hold a section."""
    return {name for name, field in Recipe.model_fields.items() if _model(field.annotation)}


def is_text(path: Sequence[str]) -> bool:
    """Whether the setting at this path takes a text and nothing else (or null)."""
    model: type[BaseModel] = Recipe
    for key in path[:-1]:
        field = model.model_fields.get(key)
        inner = _model(field.annotation) if field else None
        if inner is None:
            return False
        model = inner
    field = model.model_fields.get(path[-1])
    return field is not None and field.annotation in (str, str | None)


def describe(error: ValidationError, root: type[BaseModel] = Recipe) -> str:
    """The first problem in a line, and how many more there are.

    Args:
        error: what pydantic found.
        root: the model that was validated.
    """
    problems = _distinct(error.errors(include_url=False), root)
    more = len(problems) - 1
    return problems[0] + (f" (and {more} more: {'; '.join(problems[1:])})" if more else "")


def _distinct(details: list[ErrorDetails], root: type[BaseModel]) -> list[str]:
    """One line for each setting, though a union reports every one of its members."""
    lines: dict[str, str] = {}
    for detail in details:
        path, model = _place(detail["loc"], root)
        lines.setdefault(path, _line(path, model, root, detail))
    return list(lines.values())


def _place(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The setting's path without pydantic's names for union members, and the model it is in."""
    model = root
    keys: list[str] = []
    for item in loc:
        keys.append(str(item))
        if isinstance(item, int):  # an entry of a list of models
            continue
        field = model.model_fields.get(item)
        inner = (_model(field.annotation) or _entry(field.annotation)) if field else None
        if inner is None:
            break
        model = inner
    return ".".join(keys), model


def _line(path: str, model: type[BaseModel], root: type[BaseModel], detail: ErrorDetails) -> str:
    key = path.rpartition(".")[2]
    if detail["type"] == "extra_forbidden":
        near = closest(key, model.model_fields) or (_elsewhere(key) if root is Recipe else None)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(model.model_fields)}"
        return f"unknown key {path} (value {short(detail['input'])}); {hint}"
    if detail["type"] == "missing":
        return f"{path} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(detail["input"], bool):
        message += "; YAML reads an unquoted true or false as a flag, so quote it if it is a word"
    if detail["type"] == "model_type":
        message = "a map of settings is needed"
    if path == "prompt.label_words":
        message = "a map from labels to words, letters, auto, or null is needed"
    if path in _OR_AUTO and detail["type"] in ("int_parsing", "literal_error"):
        message = "a whole number of at least 1, or auto, is needed"
    if path == "adapter.layers" and detail["type"] in ("list_type", "literal_error"):
        message = "a list of layer numbers such as [4, 5], auto, or null for all is needed"
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):
        # Settings that do not fit each other: the message names them. A whole recipe has no path.
        return f"{path}: {message}" if path else message
    return f"{path} is {short(detail['input'])}: {message}"


def _elsewhere(key: str) -> str | None:
    """Where a key that was put into the wrong section belongs."""
    for name in sorted(sections()):
        inner = _model(Recipe.model_fields[name].annotation)
        if inner is not None and key in inner.model_fields:
            return f"{name}.{key}"
    return key if key in Recipe.model_fields else None


def _model(annotation: object) -> type[BaseModel] | None:
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _entry(annotation: object) -> type[BaseModel] | None:
    """The model that a list of models holds."""
    if get_origin(annotation) is not list:
        return None
    inner = get_args(annotation)[0]
    return _model(get_args(inner)[0] if get_origin(inner) is Annotated else inner)


def short(value: object) -> str:
    """A value as a message shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
