"""Sending a run to the hub: what is sent, and sending it.

Only files of an allow-list leave the run folder, links are refused, and what names this machine's
folders is replaced or refused before anything is sent.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft_mlx import documents, files, hub, loading, read_out
from abft_mlx import recipe as recipes
from abft_mlx.adapters import CONFIG, FACTORS, WEIGHTS
from abft_mlx.errors import AbftError, OutputError, RunError, UsageError
from abft_mlx.exchange import card, cleaning, peft
from abft_mlx.prediction import DEMONSTRATIONS_FILE
from abft_mlx.recipe import Recipe
from abft_mlx.trainer import EVALUATION_FILE, RunFolder

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    Operation = CommitOperationAdd | CommitOperationDelete

CARD = "README.md"
NEEDED = (WEIGHTS, CONFIG, "recipe.yaml", "run.json")
ALLOWED = (*NEEDED, FACTORS, read_out.FILE, "metrics.jsonl", CARD)
PEFT_FOLDER = "peft"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Upload:
    """Files to upload, already in memory.

    Attributes:
        name: the repository's id.
        files: path in the repository to content, the card among them.
    """

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
    """What came of sending.

    Attributes:
        url: of the commit, the pull request or the repository.
        commit: its hash; None where nothing had to be sent.
        pull_request: its URL, if there is one.
        created: whether the repository is new.
        sent: files that were new or changed.
        removed: files of an earlier push that this run has not.
    """

    url: str
    commit: str | None
    pull_request: str | None = None
    created: bool = False
    sent: tuple[str, ...] = ()
    removed: tuple[str, ...] = field(default=())


def pack(
    run: Path,
    name: str,
    *,
    options: card.Options | None = None,
    base_model: str | None = None,
    with_peft: bool = False,
    with_demonstrations: bool = False,
) -> Upload:
    """Read a finished run and make of it what may be sent; needs no network.

    Args:
        run: the run folder. A README.md in it takes the card's place.
        name: the repository's id.
        options: licence, language and results for the card; without results those of the run's
            own eval.json, if there is one.
        base_model: the hub id of a base that was a local folder.
        with_peft: add the adapter in PEFT's format; the base model is opened for it.
        with_demonstrations: add the demonstrations, which are texts of the run's data.

    Raises:
        UsageError: not a finished run, a link, a local path, or a name that is not a hub id.
    """
    if not hub.is_id(name):
        raise UsageError(f"{name!r} is not the name of a repository; give owner/name")
    options, results_from = options or card.Options(), "--results"
    check(run)
    found = _read(run, with_demonstrations)
    try:
        recipe = recipes.loads(found["recipe.yaml"].decode("utf-8-sig"), where=str(run))
    except UnicodeDecodeError as error:
        raise UsageError(f"{run / 'recipe.yaml'} is not UTF-8 ({error})") from None
    facts = RunFolder(run).parse_run(found["run.json"])
    if not isinstance(facts, dict) or not facts.get("finished"):
        raise UsageError(f"{run} is not finished; continue it: abft-mlx finetune --resume {run}")
    if options.results is None and (run / EVALUATION_FILE).is_file():
        results_from = str(run / EVALUATION_FILE)
        options = replace(options, results=read_results(run / EVALUATION_FILE, results_from))
    if options.results is not None:
        with documents.reading(run / "run.json"):
            _fits(options.results, recipe, facts, results_from)
    with documents.reading(run / "run.json"):
        cleaned = cleaning.clean(recipe, facts, base_model)
        text = json.dumps(cleaned.run, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    found["recipe.yaml"] = recipes.dumps(cleaned.recipe).encode()
    found["run.json"] = text.encode()
    if with_peft:
        found |= _peft(run, recipe, cleaned.base_model)
    if CARD not in found:
        written = found.get(f"{PEFT_FOLDER}/{PEFT_FILES[0]}")
        peft = None if written is None else json.loads(written)
        with documents.reading(run if options.results is None else f"{run} or {results_from}"):
            stock = not (recipe.adapter.head and _kind(found[CONFIG]) == "lora")
            made = card.write(
                cleaned,
                name,
                options=options,
                demonstrations=DEMONSTRATIONS_FILE in found,
                peft=peft,
                stock=stock,
            )
        found[CARD] = str(made).encode()
    for path, content in found.items():
        cleaning.check(path, content, cleaned.private)
    return Upload(name, dict(sorted(found.items())))


def _kind(config: bytes) -> Any:
    return files.parse_json(config).get("fine_tune_type")


def _read(run: Path, with_demonstrations: bool) -> dict[str, bytes]:
    """The files of a run folder that are sent, by name."""
    found = {}
    for name in (*ALLOWED, *((DEMONSTRATIONS_FILE,) if with_demonstrations else ())):
        path = run / name
        if path.is_symlink():
            raise UsageError(f"{path} is a link, which is not sent; put the file there")
        try:
            found[name] = path.read_bytes()
        except FileNotFoundError:
            if name in (*NEEDED, DEMONSTRATIONS_FILE):
                raise UsageError(
                    f"{run} has no {name}; give a folder that abft-mlx finetune wrote"
                ) from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    return found


def _fits(
    results: Mapping[str, Any], recipe: Recipe, facts: Mapping[str, Any], source: str
) -> None:
    """Refuse results that were measured on something else."""
    if not isinstance(results, Mapping) or "methods" not in results:
        raise UsageError(
            f"{source} contains no measurement; give what abft-mlx eval --json printed"
        )
    if results.get("adapter") is None:
        raise UsageError(
            f"{source} was measured without an adapter; run abft-mlx eval --adapter RUN --json"
        )
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
        return {
            f"{PEFT_FOLDER}/{name}": (Path(folder) / name).read_bytes()
            for name in PEFT_FILES
            if (Path(folder) / name).is_file()
        }


def send(
    upload: Upload,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
) -> Outcome:
    """Upload: make the repository if there is none, then one commit of what is new or changed.

    Large files are stored before the commit, which is one step: an interrupted push leaves the
    repository as it was, and sending again continues. If the repository has all files already,
    nothing is sent.

    Args:
        upload: from :func:`pack`.
        private: make a new repository private.
        create_pr: open a pull request instead of writing to the branch.
        revision: the branch; made if there is none. "main" is meant without it.

    Raises:
        UsageError: no token, no right, or a repository with something else in it.
        RunError: the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi

    if revision is not None and not hub.is_revision(revision):
        raise UsageError(f"--revision {revision!r} cannot be a branch; give a name such as main")
    asked = hub.Asked(
        upload.name,
        f"{upload.name} is not a repository that you may write to",
        "try later",
        revision,
        doing="sent",
    )
    key = token()
    try:
        api = HfApi(token=key)
        with hub.bars(upload.name):
            return _send(api, upload, private=private, create_pr=create_pr, revision=revision)
    except AbftError:
        raise
    except Exception as error:
        failure = _failed(error, asked)
    # Not inside the block: the hub's own error may name the token.
    raise failure


def check(run: Path) -> None:
    """See whether there is a run folder.

    Raises:
        UsageError: there is none.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such run folder; give the one that abft-mlx finetune wrote")


def token() -> str:
    """The hub's token.

    Raises:
        UsageError: there is none, or it cannot be one.
    """
    from huggingface_hub import get_token

    found = get_token()
    if found is None:
        raise UsageError(
            "there is no token for the hub; run hf auth login with one that may write, or set "
            "HF_TOKEN"
        )
    # The HTTP library would quote such a token in its error.
    if _TOKEN.fullmatch(found) is None:
        raise UsageError("the hub's token has characters that no token has; run hf auth login")
    return found


def _failed(error: Exception, asked: hub.Asked) -> AbftError:
    if isinstance(error, ValueError) and "README.md" in str(error):
        told = " ".join(str(error).split())
        return UsageError(
            f"the hub refuses the card: {hub.masked(told)}; see --license and --language"
        )
    if getattr(getattr(error, "response", None), "status_code", None) == 412:
        return RunError(f"{asked.title} changed in the meantime, so nothing was sent; push again")
    failure = hub.explain(error, asked)
    return (UsageError if failure.refused else RunError)(failure.message)


def _send(
    api: HfApi, upload: Upload, *, private: bool, create_pr: bool, revision: str | None
) -> Outcome:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, branch = upload.name, revision or "main"
    user = api.whoami().get("name")
    if not isinstance(user, str):
        raise RunError("the hub does not say who owns the token; try again later")
    try:
        info, created = api.repo_info(name), False
    except RepositoryNotFoundError:
        if create_pr:
            raise UsageError(
                f"{name} does not exist yet, so there is nothing to open a pull request on; "
                "leave --create-pr out to create it"
            ) from None
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
        if branch.startswith("refs/") or create_pr:
            raise
        api.create_branch(name, branch=branch)
        there = _there(api, name, branch)
    _ours(upload, there, create_pr=create_pr)
    url = hub.masked(f"{api.endpoint}/{name}")
    new, gone = _difference(upload, there)
    if not new and not gone:
        return Outcome(url, None, created=created)
    if create_pr:
        number = _open_pull_request(api, upload, user)
        if number is not None:
            return Outcome(url, None, f"{url}/discussions/{number}")
    operations: list[Operation] = [
        *(CommitOperationAdd(path, upload.files[path]) for path in new),
        *(CommitOperationDelete(path) for path in gone),
    ]
    sha = api.repo_info(name, revision=branch).sha
    done = api.create_commit(
        name,
        operations,
        commit_message=_message(),
        revision=branch if revision else None,
        create_pr=create_pr,
        parent_commit=sha,
    )
    pull_request = hub.masked(done.pr_url) if done.pr_url else None
    return Outcome(
        pull_request or hub.masked(done.commit_url),
        done.oid,
        pull_request,
        created,
        tuple(new),
        tuple(gone),
    )


def _message() -> str:
    from abft_mlx import __version__

    return f"An adapter trained by abft-mlx {__version__}"


def _there(api: HfApi, name: str, revision: str) -> dict[str, str]:
    """Path to what its content is known by, of all files at a revision."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(name, recursive=True, revision=revision)
    return {
        one.path: one.lfs.sha256 if one.lfs is not None else one.blob_id
        for one in entries
        if isinstance(one, RepoFile)
    }


def _difference(upload: Upload, there: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Paths that are new or changed, and paths of earlier pushes that the upload has not."""
    new = [path for path, content in upload.files.items() if there.get(path) not in _ids(content)]
    ours = {*ALLOWED, DEMONSTRATIONS_FILE, *(f"{PEFT_FOLDER}/{one}" for one in PEFT_FILES)}
    return new, sorted(path for path in there if path in ours and path not in upload.files)


def _ids(content: bytes) -> tuple[str, str]:
    """What the hub knows a content by: git's hash, or SHA-256 of a large file."""
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return git.hexdigest(), hashlib.sha256(content).hexdigest()


def _ours(upload: Upload, there: Mapping[str, str], *, create_pr: bool) -> None:
    """Refuse to write over what no push of ours wrote."""
    if create_pr or "run.json" in there:
        return
    foreign = [path for path in upload.files if path in there]
    foreign += [path for path in there if path in ("config.json", "model.safetensors")]
    if foreign:
        raise UsageError(
            f"{upload.name} contains {foreign[0]}, which no push of a run wrote; choose another "
            "name, or propose the files with --create-pr"
        )


def _open_pull_request(api: HfApi, upload: Upload, user: str) -> int | None:
    """The number of the user's open pull request that holds the upload already."""
    for one in api.get_repo_discussions(
        upload.name, author=user, discussion_type="pull_request", discussion_status="open"
    ):
        if one.is_pull_request and one.author == user:
            new, gone = _difference(upload, _there(api, upload.name, f"refs/pr/{one.num}"))
            if not new and not gone:
                return one.num
    return None


def read_results(path: Path, source: str | None = None) -> dict[str, Any]:
    """The document that ``abft-mlx eval --json`` printed into a file.

    Args:
        path: the file.
        source: what to call it in an error.

    Raises:
        UsageError: it is not there, or not JSON.
    """
    source = source or f"--results {path}"
    try:
        return files.parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{source}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{source} is not JSON ({error})") from None
