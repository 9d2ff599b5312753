"""What of a run may leave this machine: its facts and its recipe without a local path.

A base or a data set that is a file here is called "a local folder" or "a local file"; whatever else
looks like a path of this machine is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abft_mlx import data, hub, loading
from abft_mlx import recipe as recipes
from abft_mlx.errors import UsageError
from abft_mlx.files import parse_json
from abft_mlx.recipe import DataSection, Recipe, TaskSection

# Neither a hub id nor a file's name, so that whoever runs the recipe is asked for their own.
LOCAL_MODEL, LOCAL_DATA = "(a local folder)", "(a local file)"
# A path from the root, the home or a drive, with a folder in it.
_PATH = re.compile(r"(/|~[\w.-]*/|\.{1,2}/|[A-Za-z]:[\\/])[^\s/\\]+[/\\]\S*|(~|\.{1,2})/\S+")


@dataclass(frozen=True)
class Cleaned:
    """A run as others may see it.

    Attributes:
        recipe: with placeholders for what is on this machine only.
        run: the content of run.json, likewise.
        base_model: the base's hub id, None where it has none.
        datasets: hub ids of the data it was trained and measured on, for the card.
        private: words that name what is local, none of which may be sent.
    """

    recipe: Recipe
    run: dict[str, Any]
    base_model: str | None
    datasets: tuple[str, ...]
    private: tuple[str, ...]


def clean(recipe: Recipe, run: Mapping[str, Any], base_model: str | None = None) -> Cleaned:
    """Take a run's local names out of its recipe and facts.

    Args:
        recipe: the run's, as it was resolved.
        run: the content of its run.json.
        base_model: the hub id of a base that was a local folder.

    Raises:
        UsageError: ``base_model`` is not a hub id, or the run's base has one already.
    """
    known = run.get("model", {}).get("kind") or loading.kind(recipe.model)
    local = known == "folder" or _is_path(recipe.model)
    on_hub = known == "hub" and not local and hub.is_id(recipe.model)
    if base_model is not None:
        if not hub.is_id(base_model):
            raise UsageError(f"--base-model {base_model!r} is not a hub id; give owner/name")
        if not local:
            raise UsageError(
                f"--base-model is for runs whose base is a local folder; this one's is "
                f"{recipe.model}; leave it out"
            )
    private = {recipe.model} if local else set()
    base = base_model if local else (recipe.model if on_hub else None)
    changes: dict[str, Any] = {"model": base_model or LOCAL_MODEL} if local else {}
    main_kind = run.get("data", {}).get("kind") or data.kind(recipe.data.source)
    labels = tuple(map(str, run.get("labels", {})))
    sections = [recipe.data, *(one.data for one in (*recipe.mixture, *recipe.evaluation.transfer))]
    kinds = [main_kind, *(data.kind(one.source) for one in sections[1:])]
    private |= {one.source for one, kind in zip(sections, kinds, strict=True) if kind == "file"}
    datasets = [one.source for one, kind in zip(sections, kinds, strict=True) if kind == "hub"]
    changes["data"] = _texts(recipe.data, main_kind, labels)
    changes["mixture"] = [_task(one) for one in recipe.mixture]
    transfer = [_task(one) for one in recipe.evaluation.transfer]
    changes["evaluation"] = recipe.evaluation.model_copy(update={"transfer": transfer})
    named = {
        one.name for one in (*recipe.mixture, *recipe.evaluation.transfer) if _is_path(one.name)
    }
    private |= named
    cleaned = recipe.model_copy(update=changes)
    renamed = dict.fromkeys(private, LOCAL_DATA) | {one: Path(one).stem for one in named}
    if local:
        renamed[recipe.model] = base_model or LOCAL_MODEL
    facts = _renamed(dict(run), renamed)
    return Cleaned(cleaned, facts, base, tuple(dict.fromkeys(datasets)), tuple(sorted(private)))


def _texts(section: DataSection, kind: str, labels: tuple[str, ...] = ()) -> DataSection:
    if kind != "file":
        return section
    changes: dict[str, Any] = {"source": LOCAL_DATA}
    # With the labels' names, predict needs nothing but demonstrations.
    if section.labels is None and labels:
        changes["labels"] = list(labels)
    return section.model_copy(update=changes)


def _task(task: TaskSection) -> TaskSection:
    name = Path(task.name).stem if _is_path(task.name) else task.name
    texts = _texts(task.data, data.kind(task.data.source))
    return task.model_copy(update={"name": name, "data": texts})


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or _PATH.fullmatch(name) is not None


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value


def check(name: str, content: bytes, private: tuple[str, ...]) -> None:
    """Refuse a file that says where something lies on this machine.

    Args:
        name: the file's, for the error; its ending says how it is read.
        content: its bytes; of .safetensors the header alone is looked at.
        private: words that must not be in it, and the user's own folders beside them.

    Raises:
        UsageError: it holds a local path; the message names both, and the way out.
    """
    readers: dict[str, Callable[[bytes], Any]] = {
        ".json": parse_json,
        ".jsonl": lambda text: [parse_json(line) for line in text.splitlines() if line.strip()],
        ".yaml": lambda text: recipes.loads(text.decode()).model_dump(mode="json"),
        ".safetensors": _header,
    }
    reader = readers.get(Path(name).suffix)
    home = str(Path.home())
    words = [one for one in (*private, home, str(Path.cwd())) if len(one) > 2]
    try:
        values = list(_strings(reader(content))) if reader else content.decode().splitlines()
    except (ValueError, KeyError) as error:
        raise UsageError(f"{name} cannot be read ({error}); train or copy it again") from None
    for one in values:
        found = next((word for word in words if _holds(one, word)), None)
        if found is None and reader is not None and _PATH.fullmatch(one):
            found = one
        if found is not None:
            raise UsageError(
                f"{name} names {found!r}, a path of this machine, so nothing is sent; take it out "
                "of that file in the run folder"
            )


def _holds(text: str, word: str) -> bool:
    # A bare word may be an ordinary one; within a longer text only a path is a leak.
    if "/" in word or "\\" in word:
        return re.search(rf"{re.escape(word)}(?![\w.-])", text) is not None
    return text == word


def _header(content: bytes) -> Any:
    size = int.from_bytes(content[:8], "little")
    return parse_json(content[8 : 8 + size])


def _strings(value: Any) -> Iterator[str]:
    """Every text in a document, keys among them, in order, however deep it lies."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left.extend(part for pair in reversed(one.items()) for part in reversed(pair))
        elif isinstance(one, list):
            left.extend(reversed(one))
        elif isinstance(one, str):
            yield one
