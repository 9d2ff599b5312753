"""Sending a run to the hub: what is sent, and sending it.

Only files of an allow-list leave the run folder, links are refused, and what names this machine's
folders is replaced or refused before anything is sent.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from abft_mlx import data, files, hub, loading, read_out
from abft_mlx import recipe as recipes
from abft_mlx.adapters import CONFIG, FACTORS, WEIGHTS
from abft_mlx.errors import AbftError, OutputError, RunError, UsageError
from abft_mlx.exchange import card, peft
from abft_mlx.exchange.card import LOCAL_DATA, LOCAL_MODEL
from abft_mlx.prediction import DEMONSTRATIONS_FILE
from abft_mlx.recipe import Recipe
from abft_mlx.trainer import EVALUATION_FILE, RunFolder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
NEEDED = (WEIGHTS, CONFIG, "recipe.yaml", "run.json")
ALLOWED = (*NEEDED, FACTORS, read_out.FILE, "metrics.jsonl", CARD)
PEFT_FILES = tuple(f"peft/{name}" for name in ("adapter_config.json", "adapter_model.safetensors"))
# A path from the root, the home or a drive, with a folder in it.
_PATH = re.compile(r"(/|~[\w.-]*/|\.{1,2}/|[A-Za-z]:[\\/])[^\s/\\]+[/\\]\S*|(~|\.{1,2})/\S+")


@dataclass(frozen=True)
class Upload:
    """Files to upload to a repository, already in memory, the card among them."""

    name: str
    files: Mapping[str, bytes]

    @property
    def card(self) -> str:
        """The model card."""
        return self.files[CARD].decode()

    def sizes(self) -> dict[str, int]:
        """Path to bytes."""
        return {path: len(content) for path, content in self.files.items()}


@dataclass(frozen=True)
class Outcome:
    """What was sent."""

    url: str  # of the commit, or of the repository
    commit: str | None  # its hash; None where nothing had to be sent
    created: bool = False  # whether the repository is new
    sent: tuple[str, ...] = ()  # files that were new or changed
    removed: tuple[str, ...] = ()  # files of an earlier push that this run has not


def pack(
    run: Path,
    name: str,
    *,
    options: card.Options | None = None,
    base_model: str | None = None,
    with_peft: bool = False,
    with_demonstrations: bool = False,
) -> Upload:
    """Read a finished run and prepare what may be sent; needs no network.

    Args:
        run: the run folder. A README.md in it takes the card's place.
        name: the repository's id.
        options: licence, language and results for the card; without results those of the run's
            own eval.json, if there is one.
        base_model: the hub id of a base that was a local folder.
        with_peft: add the adapter in PEFT's format; the base model is opened for it.
        with_demonstrations: add the demonstrations, which are texts of the run's data.
    """
    if not hub.is_id(name):
        raise UsageError(f"{name!r} is not the name of a repository; give owner/name")
    options, source = options or card.Options(), "--results"
    check(run)
    contents = _read(run, with_demonstrations)
    try:
        recipe = recipes.loads(contents["recipe.yaml"].decode("utf-8-sig"), where=str(run))
    except UnicodeDecodeError as error:
        raise UsageError(f"{run / 'recipe.yaml'} is not UTF-8 ({error})") from None
    facts = RunFolder(run).parse_run(contents["run.json"])
    if not facts.get("finished"):
        raise UsageError(f"{run} is not finished; continue it: abft-mlx finetune --resume {run}")
    if options.results is None and (run / EVALUATION_FILE).is_file():
        source = str(run / EVALUATION_FILE)
        options = replace(options, results=read_results(run / EVALUATION_FILE, source))
    try:
        if options.results is not None:
            _check_results(options.results, recipe, facts, source)
        cleaned, private = clean(recipe, facts, base_model)
        text = json.dumps(cleaned.facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        contents["recipe.yaml"] = recipes.dumps(cleaned.recipe).encode()
        contents["run.json"] = text.encode()
        if with_peft:
            contents |= _peft(run, recipe, cleaned.base_model)
        if CARD not in contents:
            written = contents.get(PEFT_FILES[0])
            kind = files.parse_json(contents[CONFIG]).get("fine_tune_type")
            contents[CARD] = card.write(
                cleaned,
                name,
                options,
                demonstrations=DEMONSTRATIONS_FILE in contents,
                peft=None if written is None else json.loads(written),
                stock=not (recipe.adapter.head and kind == "lora"),
            ).encode()
    except (
        KeyError, TypeError, ValueError, AttributeError, RecursionError, jinja2.UndefinedError,
    ) as error:  # fmt: skip
        where = ", ".join(["run.json", CONFIG, *([source] if options.results else [])])
        raise OutputError(
            f"{run}: one of {where} contains what cannot be read ({error!r:.200}); make it again"
        ) from error
    for path, content in contents.items():
        _check_paths(path, content, private)
    return Upload(name, dict(sorted(contents.items())))


def _read(run: Path, with_demonstrations: bool) -> dict[str, bytes]:
    """The files of a run folder that are sent, by name."""
    contents = {}
    for name in (*ALLOWED, *((DEMONSTRATIONS_FILE,) if with_demonstrations else ())):
        path = run / name
        if path.is_symlink():
            raise UsageError(f"{path} is a link, which is not sent; put the file there")
        try:
            contents[name] = path.read_bytes()
        except FileNotFoundError:
            if name in (*NEEDED, DEMONSTRATIONS_FILE):
                raise UsageError(
                    f"{run} has no {name}; give a folder that abft-mlx finetune wrote"
                ) from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    return contents


def _check_results(
    results: Mapping[str, Any], recipe: Recipe, facts: Mapping[str, Any], source: str
) -> None:
    """Refuse results that were measured on something else."""
    if not isinstance(results, Mapping) or "methods" not in results:
        raise UsageError(
            f"{source} contains no measurement; give what abft-mlx eval --json printed"
        )
    if results.get("adapter") is None:
        raise UsageError(f"{source} was measured without an adapter; run abft-mlx eval RUN --json")
    wanted = {
        "data": recipe.data.source,
        "labels": list(facts.get("labels", {})),
        "k": card.shown(facts, recipe, "classifier" in results["methods"]),
    }
    for key, value in wanted.items():
        measured = results.get(key)
        # A run and its data may have been moved.
        moved = key == "data" and Path(str(measured)).name == Path(value).name
        if measured != value and not moved:
            raise UsageError(
                f"{source} was measured with {key} {measured!r}, the run has {value!r}; measure "
                "this run"
            )


def _peft(run: Path, recipe: Recipe, base_model: str | None) -> dict[str, bytes]:
    """The adapter's files in PEFT's format, by their paths in the repository."""
    loaded = loading.load_model(recipe.model, recipe.revision, adapter=run)
    with tempfile.TemporaryDirectory() as folder:
        # Transformers cannot load what mlx-lm quantized.
        base = None if "quantization" in loaded.config else base_model
        peft.save(loaded.model, Path(folder), base_model=base)
        return {path: (Path(folder) / Path(path).name).read_bytes() for path in PEFT_FILES}


def clean(
    recipe: Recipe, facts: Mapping[str, Any], base_model: str | None = None
) -> tuple[card.Run, tuple[str, ...]]:
    """Take a run's local names out of its recipe and facts.

    Returns:
        The run as others may see it, and the words that name what is local.
    """
    kind = facts.get("model", {}).get("kind") or loading.kind(recipe.model)
    local = kind == "folder" or _is_path(recipe.model)
    if base_model is not None and not hub.is_id(base_model):
        raise UsageError(f"--base-model {base_model!r} is not a hub id; give owner/name")
    if base_model is not None and not local:
        raise UsageError(
            f"--base-model is for runs whose base is a local folder; this one's is {recipe.model}; "
            "leave it out"
        )
    tasks = (*recipe.mixture, *recipe.evaluation.transfer)
    # What a path is called for others. A relative folder looks like a hub id from elsewhere, so
    # what the run wrote down of its own data counts.
    main = facts.get("data", {}).get("kind") or data.kind(recipe.data.source)
    kinds = {task.data.source: data.kind(task.data.source) for task in tasks}
    kinds[recipe.data.source] = main
    names = {source: LOCAL_DATA for source, kind in kinds.items() if kind == "file"}
    names |= {task.name: Path(task.name).stem for task in tasks if _is_path(task.name)}
    names |= {recipe.model: base_model or LOCAL_MODEL} if local else {}
    document = _renamed(recipe.model_dump(mode="json"), names)
    # With the labels' names, predict needs nothing but demonstrations.
    if main == "file" and recipe.data.labels is None and facts.get("labels"):
        document["data"]["labels"] = [str(label) for label in facts["labels"]]
    on_hub = kind == "hub" and hub.is_id(recipe.model)
    base = base_model if local else (recipe.model if on_hub else None)
    every = (recipe.data.source, *(task.data.source for task in tasks))
    datasets = tuple(dict.fromkeys(source for source in every if kinds[source] == "hub"))
    cleaned = Recipe.model_validate(document)
    return card.Run(cleaned, _renamed(dict(facts), names), base, datasets), tuple(sorted(names))


def _is_path(name: str) -> bool:
    """Whether a model's or a task's name is a file or folder of this machine."""
    return name.endswith((".yaml", ".yml")) or _PATH.fullmatch(name) is not None


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A document with some of its texts replaced, keys among them."""
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def _check_paths(name: str, content: bytes, private: tuple[str, ...]) -> None:
    """Refuse a file that contains a path of this machine; of .safetensors the header is read."""
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    try:
        if suffix == ".jsonl":
            documents = [files.parse_json(line) for line in content.splitlines() if line.strip()]
        elif suffix in (".json", ".safetensors"):
            documents = [files.parse_json(content)]
        else:
            text = content.decode()
            documents = [yaml.safe_load(text)] if suffix == ".yaml" else text.splitlines()
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{name} cannot be read ({error}); train or copy it again") from None
    words = [word for word in (*private, str(Path.home()), str(Path.cwd())) if len(word) > 2]
    for text in _texts(documents):
        leak = next((word for word in words if _holds(text, word)), None)
        if leak is None and suffix != ".md" and _PATH.fullmatch(text):
            leak = text
        if leak is not None:
            raise UsageError(
                f"{name} names {leak!r}, a path of this machine, so nothing is sent; take it out "
                "of that file in the run folder"
            )


def _holds(text: str, word: str) -> bool:
    """Whether a text names a path; a bare word may be an ordinary one, so it must be the text."""
    if "/" in word or "\\" in word:
        return re.search(rf"{re.escape(word)}(?![\w.-])", text) is not None
    return text == word


def _texts(value: Any) -> Iterator[str]:
    """Every text in a document, keys among them, however deep it lies."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            left += part
        elif isinstance(part, str):
            yield part


def send(upload: Upload, *, private: bool = False, revision: str | None = None) -> Outcome:
    """Upload: make the repository if there is none, then one commit of what is new or changed.

    Large files are stored before the commit, which is one step: an interrupted push leaves the
    repository as it was, and sending again continues. If the repository has all files already,
    nothing is sent.

    Args:
        upload: from :func:`pack`.
        private: make a new repository private.
        revision: the branch; made if there is none. "main" is meant without it.

    Raises:
        UsageError: no token, no right, or a repository with something else in it.
        RunError: the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi

    if revision is not None and not hub.is_revision(revision):
        raise UsageError(f"--revision {revision!r} cannot be a branch; give a name such as main")
    request = hub.Request(
        upload.name,
        f"{upload.name} is not a repository that you may write to",
        "try later",
        revision,
        doing="sent",
    )
    key = token()
    try:
        with hub.bars(upload.name):
            return _send(HfApi(token=key), upload, private, revision)
    except AbftError:
        raise
    except Exception as error:
        failure = _failed(error, request)
    # Not inside the block: the hub's own error may name the token.
    raise failure


def check(run: Path) -> None:
    """Raise UsageError if there is no run folder."""
    if not run.is_dir():
        raise UsageError(f"{run}: no such run folder; give the one that abft-mlx finetune wrote")


def token() -> str:
    """The hub's token; UsageError if there is none, or it cannot be one."""
    from huggingface_hub import get_token

    key = get_token()
    if key is None:
        raise UsageError(
            "there is no token for the hub; run hf auth login with one that may write, or set "
            "HF_TOKEN"
        )
    # The HTTP library would quote such a token in its error.
    if re.fullmatch(r"[\x21-\x7e]+", key) is None:
        raise UsageError("the hub's token has characters that no token has; run hf auth login")
    return key


def _failed(error: Exception, request: hub.Request) -> AbftError:
    """The error of ours for one of the hub's."""
    if isinstance(error, ValueError) and "README.md" in str(error):
        reason = hub.masked(" ".join(str(error).split()))
        return UsageError(f"the hub refuses the card: {reason}; see --license and --language")
    if getattr(getattr(error, "response", None), "status_code", None) == 412:
        return RunError(f"{request.title} changed in the meantime, so nothing was sent; push again")
    failure = hub.explain(error, request)
    return (UsageError if failure.refused else RunError)(failure.message)


def _send(api: HfApi, upload: Upload, private: bool, revision: str | None) -> Outcome:
    """As :func:`send`, with the hub's own errors."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    from abft_mlx import __version__

    name, branch = upload.name, revision or "main"
    api.whoami()  # a token that the hub does not accept is an error before anything is made
    try:
        info, created = api.repo_info(name), False
    except RepositoryNotFoundError:
        api.create_repo(name, private=private)
        info, created = api.repo_info(name), True
    if private and not info.private:
        raise UsageError(
            f"{name} exists and is public, so nothing was sent; make it private in its settings, "
            "or leave --private out"
        )
    try:
        there = _there(api, name, branch)
    except RevisionNotFoundError:
        if branch.startswith("refs/"):
            raise
        api.create_branch(name, branch=branch)
        there = _there(api, name, branch)
    foreign = [
        path for path in (*upload.files, "config.json", "model.safetensors") if path in there
    ]
    if foreign and "run.json" not in there:
        raise UsageError(
            f"{name} contains {foreign[0]}, which no push of a run wrote; choose another name"
        )
    new = []
    for path, content in upload.files.items():
        # The hub knows a small file by git's hash, a large one by SHA-256.
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        if there.get(path) not in (git.hexdigest(), hashlib.sha256(content).hexdigest()):
            new.append(path)
    ours = {*ALLOWED, DEMONSTRATIONS_FILE, *PEFT_FILES}
    gone = sorted(path for path in there if path in ours and path not in upload.files)
    if not new and not gone:
        return Outcome(hub.masked(f"{api.endpoint}/{name}"), None, created)
    commit = api.create_commit(
        name,
        [
            *(CommitOperationAdd(path, upload.files[path]) for path in new),
            *(CommitOperationDelete(path) for path in gone),
        ],
        commit_message=f"An adapter trained by abft-mlx {__version__}",
        revision=branch if revision else None,
        parent_commit=api.repo_info(name, revision=branch).sha,
    )
    return Outcome(hub.masked(commit.commit_url), commit.oid, created, tuple(new), tuple(gone))


def _there(api: HfApi, name: str, revision: str) -> dict[str, str]:
    """Path to the hash of its content, of all files at a revision."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        for entry in api.list_repo_tree(name, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }


def read_results(path: Path, source: str | None = None) -> dict[str, Any]:
    """The document that ``abft-mlx eval --json`` printed into a file; errors call it ``source``."""
    source = source or f"--results {path}"
    try:
        return files.parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{source}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{source} is not JSON ({error})") from None
