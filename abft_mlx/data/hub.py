"""Data sets of the hub: files fetched once, from the cache after, and read like any other file."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from abft_mlx import hub
from abft_mlx.data import rows
from abft_mlx.data.sampling import Generator
from abft_mlx.errors import AbftError, DataError, RecipeError, RunError, first_few
from abft_mlx.recipe import DataSection
from abft_mlx.recipe.files import parse

CONVERTED = "refs/convert/parquet"
STAICC_LONGEST = 1024
STAICC_SEED = 42
_SHARDS = re.compile(r"-\d+(-of-(\d+)\.)")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def title(section: DataSection) -> str:
    """The data set for messages: name, configuration, split and revision."""
    named = [section.source, *([section.config] if section.config else []), section.split]
    return " ".join(named) + (f"@{section.revision}" if section.revision else "")


def read(section: DataSection) -> rows.Table:
    """Fetch the files of a split, or find them in the cache, and read them.

    Data sets that were a script have no files of their own; the hub keeps a conversion of them,
    which is used where the recipe names no revision.

    Raises:
        DataError: no such data set, configuration or split, or no access.
        RunError: the hub cannot be reached and the cache has no copy.
    """
    paths: list[Path] = []
    offline = False
    for revision in [section.revision] if section.revision else [None, CONVERTED]:
        fetched = _fetch(section, revision)
        offline = offline or fetched is None
        paths = paths or fetched or []
        if paths:
            break
    if not paths and offline:
        raise RunError(
            f"{title(section)} is not in the local cache and the hub cannot be reached; go online "
            "once, or name a file"
        )
    if not paths:
        raise DataError(
            f"{section.source}: no {', '.join(rows.READERS)} file in it that can be read; "
            "download it and name a file of yours"
        )
    table = rows.Table()
    for path in paths:
        part = rows.read(path, section.text, section.label)
        before = f"{path.name} " if len(paths) > 1 else ""
        table.names = table.names or part.names
        table.problems += [before + line for line in part.problems]
        for row in part.rows:
            row.place = before + row.place
        table.rows += part.rows
    if section.staicc_order:
        table.rows = staicc_order(table.rows)
    return table


def staicc_order(table_rows: list[rows.Row]) -> list[rows.Row]:
    """The order in which the StaICC benchmark keeps a data set's rows, long texts left out."""
    kept = [
        row
        for row in table_rows
        if not isinstance(row.text, str) or len(row.text) <= STAICC_LONGEST
    ]
    return [kept[i] for i in Generator(STAICC_SEED).draw(len(kept), len(kept))] if kept else []


def _fetch(section: DataSection, revision: str | None) -> list[Path] | None:
    """Local paths of the split's files at a revision; None without a network or a copy."""
    from huggingface_hub import HfApi, errors, snapshot_download

    name = section.source
    unknown = (
        errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError,
    )  # fmt: skip
    try:
        try:
            siblings = HfApi().dataset_info(name, revision=revision).siblings or []
        except unknown:
            raise
        except Exception as error:
            try:
                folder = Path(
                    snapshot_download(
                        name, repo_type="dataset", revision=revision, local_files_only=True
                    )
                )
            except errors.LocalEntryNotFoundError:
                raise error from None
            cached = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
            return [folder / file for file in _of_split(section, cached, _card(folder))]
        listed = [sibling.rfilename for sibling in siblings]
        readme = "README.md" in listed
        card = _card(hub.file(name, "README.md", revision=revision).parent) if readme else []
        chosen = _of_split(section, listed, card)
        return [hub.file(name, file, revision=revision) for file in chosen]
    except AbftError:
        raise
    except Exception as error:
        absent = f"{name!r} is no file here and no data set of the hub that you may read"
        failure = hub.explain(
            error, hub.Request(name, absent, "name a file", revision, "check data.revision")
        )
        if failure.kind == "revision" and section.revision is None:
            return []
        if failure.kind == "offline":
            return None
        raise (DataError if failure.refused else RunError)(failure.message) from None


def _card(folder: Path) -> list[dict[str, Any]]:
    """The configurations that a data set's card lists."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    match = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    try:
        configs = parse(match[1], str(card)).get("configs") if match else None
    except RecipeError:
        return []
    return [c for c in configs or [] if isinstance(c, dict) and c.get("data_files")]


def _of_split(section: DataSection, listed: list[str], configs: list[dict[str, Any]]) -> list[str]:
    """The files of every split that is wanted, in order."""
    data = sorted(file for file in listed if PurePosixPath(file).suffix in rows.READERS)
    patterns = _patterns(section, configs) if data and configs else {}
    chosen: list[str] = []
    for split in [part.strip() for part in section.split.split("+")] if data else ():
        if patterns:
            wanted = patterns.get(split, [])
            files = [file for file in data if any(fnmatch(file, pattern) for pattern in wanted)]
        else:
            files = _guess(section, data, split)
        if not files:
            splits = f"; splits are {', '.join(patterns)}" if patterns else ""
            raise DataError(
                f"{section.source} has no files for split {split!r}{splits}; its data files are "
                f"{first_few(data)}; check data.config and data.split"
            )
        for shard in filter(None, map(_SHARDS.search, files)):
            here = sum(shard[1] in file for file in files)
            if here < int(shard[2]):
                raise RunError(
                    f"{section.source}: {here} of {int(shard[2])} files of a split are in the "
                    "local cache and the hub cannot be reached; go online once"
                )
        chosen += files
    return chosen


def _patterns(section: DataSection, configs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """File patterns of each split as the card lists them."""
    named = {str(config.get("config_name", "default")): config for config in configs}
    defaults = [name for name, config in named.items() if config.get("default")]
    only = next(iter(named)) if len(named) == 1 else "default"
    name = section.config or (defaults[0] if defaults else only)
    if name not in named:
        raise _config(section, sorted(named))
    files = named[name]["data_files"]
    base = str(named[name].get("data_dir") or "").strip("/")
    patterns: dict[str, list[str]] = {}
    for entry in files if isinstance(files, list) else [files]:
        split, paths = "train", entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", "train")), entry.get("path", [])
        for path in paths if isinstance(paths, list) else [paths]:
            patterns.setdefault(split, []).append(f"{base}/{path}" if base else str(path))
    return patterns


def _config(section: DataSection, names: list[str]) -> DataError:
    """The error of a configuration that does not exist."""
    which = f"{section.config!r} is none of them" if section.config else "none is set"
    return DataError(f"{section.source}: data.config must be one of {first_few(names)}; {which}")


def _guess(section: DataSection, data: list[str], split: str) -> list[str]:
    """Files whose path holds the configuration and the split; of one kind, Parquet first."""
    if section.config:
        inside = [f for f in data if section.config in PurePosixPath(f).parts]
        files = inside or [f for f in data if PurePosixPath(f).name.startswith(section.config)]
    else:
        folders = sorted({f.split("/", 1)[0] for f in data if "/" in f} - {"data", "default"})
        files = [f for f in data if f.split("/", 1)[0] not in folders] or data
        if files is data and len(folders) > 1 and not any(_in_split(f, split) for f in folders):
            raise _config(section, folders)
    chosen = [file for file in files if _in_split(file, split)]
    if not chosen and split == "train":
        chosen = [file for file in files if not any(_in_split(file, s) for s in _SPLIT_WORDS)]
    order = [".parquet", *rows.READERS] if find_spec("pyarrow") else [*rows.READERS, ".parquet"]
    same = ([file for file in chosen if file.endswith(suffix)] for suffix in order)
    return next((files for files in same if files), [])


def _in_split(file: str, split: str) -> bool:
    """Whether a path names a split."""
    words = "|".join(map(re.escape, _SPLIT_WORDS.get(split, (split,))))
    return re.search(rf"(^|[/_.-])({words})([/_.-]|$)", file) is not None
