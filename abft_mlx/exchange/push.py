"""Sending a run to the hub: what is sent, and sending it.

Only files of an allow-list leave the run folder, links are not followed, and what names this
machine's folders is replaced or refused before anything is sent.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft_mlx import documents, files, hub, loading
from abft_mlx import recipe as recipes
from abft_mlx.adapters import CONFIG
from abft_mlx.errors import AbftError, OutputError, RunError, UsageError
from abft_mlx.exchange import card, cleaning, own_files, peft
from abft_mlx.exchange.own_files import ALLOWED, CARD
from abft_mlx.recipe import Recipe
from abft_mlx.trainer import RunFolder

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    Operation = CommitOperationAdd | CommitOperationDelete

PEFT_FOLDER = "peft"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Parcel:
    """What is sent, complete: nothing is read from the run folder any more.

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
    wishes: card.Wishes | None = None,
    base_model: str | None = None,
    with_peft: bool = False,
) -> Parcel:
    """Read a finished run and make of it what may be sent; needs no network.

    Args:
        run: the run folder. A README.md in it takes the card's place.
        name: the repository's id.
        wishes: what the card says of licence, language and results.
        base_model: the hub id of a base that was a local folder.
        with_peft: add the adapter in PEFT's format; the base model is opened for it.

    Raises:
        UsageError: not a finished run, a link, a local path, or a name that is no hub id.
    """
    if not hub.is_id(name):
        raise UsageError(f"{name!r} is no name of a repository; give owner/name")
    wishes = wishes or card.Wishes()
    found = own_files.read(run)
    # Of what was read above: a file may have become another meanwhile.
    recipe = recipes.loads(
        own_files.text(found, "recipe.yaml", run), where=str(run / "recipe.yaml")
    )
    facts = RunFolder(run).parse_run(found["run.json"])
    if not isinstance(facts, dict) or not facts.get("finished"):
        raise UsageError(f"{run} is not finished; abft-mlx finetune --resume {run} goes on with it")
    if wishes.results is not None:
        with documents.reading(run / "run.json"):
            _fits(wishes.results, recipe, facts)
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
        with documents.reading(run if wishes.results is None else f"{run} or --results"):
            stock = not (recipe.adapter.head and _kind(found[CONFIG]) == "lora")
            made = card.write(cleaned, name, wishes=wishes, peft=peft, stock=stock)
        found[CARD] = str(made).encode()
    for path, content in found.items():
        cleaning.check(path, content, cleaned.private)
    return Parcel(name, dict(sorted(found.items())))


def _kind(config: bytes) -> Any:
    return files.parse_json(config).get("fine_tune_type")


def _fits(results: Mapping[str, Any], recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Refuse results that were measured on something else."""
    if not isinstance(results, Mapping) or "methods" not in results:
        raise UsageError("--results holds no measurement; give what abft-mlx eval --json printed")
    if results.get("adapter") is None:
        raise UsageError(
            "--results was measured without an adapter; run abft-mlx eval --adapter RUN --json"
        )
    wanted = {
        "data": recipe.data.source,
        "labels": list(facts.get("labels", {})),
        "k": recipe.prompt.demonstrations,
    }
    for key, value in wanted.items():
        if results.get(key) != value:
            raise UsageError(
                f"--results was measured with {key} {results.get(key)!r}, the run has {value!r}; "
                "measure this run"
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
    parcel: Parcel,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
) -> Outcome:
    """Send a parcel: make the repository if there is none, then one commit of what is new in it.

    Large files are stored before the commit, which is one step: an interrupted push leaves the
    repository as it was, and sending again goes on. Where the repository holds all of the parcel
    nothing is sent.

    Args:
        parcel: from :func:`pack`.
        private: make a new repository private.
        create_pr: open a pull request instead of writing to the branch.
        revision: the branch; made if there is none. "main" is meant without it.

    Raises:
        UsageError: no token, no right, or a repository with something else in it.
        RunError: the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi

    if revision is not None and not hub.is_revision(revision):
        raise UsageError(f"--revision {revision!r} can be no branch; give a name such as main")
    asked = hub.Asked(
        parcel.name,
        f"{parcel.name} is no repository that you may write to",
        "try later",
        revision,
        doing="sent",
    )
    held = token()
    try:
        api = HfApi(token=held)
        with hub.bars(parcel.name):
            return _send(api, parcel, private=private, create_pr=create_pr, revision=revision)
    except AbftError:
        raise
    except Exception as error:
        failure = _failed(error, asked)
    # Not inside the block: the hub's own error, which may name the token, is no part of ours.
    raise failure


def token() -> str:
    """The hub's token.

    Raises:
        UsageError: there is none, or it can be none.
    """
    from huggingface_hub import get_token

    found = get_token()
    if found is None:
        raise UsageError(
            "there is no token of the hub; run hf auth login with one that may write, or set "
            "HF_TOKEN"
        )
    # The HTTP library would quote such a token in its error.
    if _TOKEN.fullmatch(found) is None:
        raise UsageError("the hub's token holds characters that no token has; run hf auth login")
    return found


def _failed(error: Exception, asked: hub.Asked) -> AbftError:
    if isinstance(error, ValueError) and "README.md" in str(error):
        told = " ".join(str(error).split())
        return UsageError(
            f"the hub refuses the card: {hub.masked(told)}; see --license and --language"
        )
    if getattr(getattr(error, "response", None), "status_code", None) == 412:
        return RunError(f"{asked.title} has changed meanwhile, so nothing was sent; push again")
    failure = hub.explain(error, asked)
    return (UsageError if failure.refused else RunError)(failure.message)


def _send(
    api: HfApi, parcel: Parcel, *, private: bool, create_pr: bool, revision: str | None
) -> Outcome:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, branch = parcel.name, revision or "main"
    user = api.whoami().get("name")
    if not isinstance(user, str):
        raise RunError("the hub does not say whose the token is; try again later")
    try:
        info, created = api.repo_info(name), False
    except RepositoryNotFoundError:
        if create_pr:
            raise UsageError(
                f"{name} is no repository yet, so there is nothing to open a pull request on; "
                "leave --create-pr out to make it"
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
    _ours(parcel, there, create_pr=create_pr)
    url = hub.masked(f"{api.endpoint}/{name}")
    new, gone = _difference(parcel, there)
    if not new and not gone:
        return Outcome(url, None, created=created)
    if create_pr:
        number = _open_pull_request(api, parcel, user)
        if number is not None:
            return Outcome(url, None, f"{url}/discussions/{number}")
    operations: list[Operation] = [
        *(CommitOperationAdd(path, parcel.files[path]) for path in new),
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


def _difference(parcel: Parcel, there: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Paths that are new or changed, and paths of earlier pushes that the parcel has not."""
    new = [path for path, content in parcel.files.items() if there.get(path) not in _ids(content)]
    ours = {*ALLOWED, *(f"{PEFT_FOLDER}/{one}" for one in PEFT_FILES)}
    return new, sorted(path for path in there if path in ours and path not in parcel.files)


def _ids(content: bytes) -> tuple[str, str]:
    """What the hub knows a content by: git's hash, or SHA-256 of a large file."""
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return git.hexdigest(), hashlib.sha256(content).hexdigest()


def _ours(parcel: Parcel, there: Mapping[str, str], *, create_pr: bool) -> None:
    """Refuse to write over what no push of ours wrote."""
    if create_pr or "run.json" in there:
        return
    foreign = [path for path in parcel.files if path in there]
    foreign += [path for path in there if path in ("config.json", "model.safetensors")]
    if foreign:
        raise UsageError(
            f"{parcel.name} is taken: it holds {foreign[0]}, which no push of a run wrote; choose "
            "another name, or propose it with --create-pr"
        )


def _open_pull_request(api: HfApi, parcel: Parcel, user: str) -> int | None:
    """The number of the user's open pull request that holds the parcel already."""
    for one in api.get_repo_discussions(
        parcel.name, author=user, discussion_type="pull_request", discussion_status="open"
    ):
        if one.is_pull_request and one.author == user:
            new, gone = _difference(parcel, _there(api, parcel.name, f"refs/pr/{one.num}"))
            if not new and not gone:
                return one.num
    return None


def read_results(path: Path) -> dict[str, Any]:
    """The document that ``abft-mlx eval --json`` printed into a file.

    Raises:
        UsageError: it is not there, or not JSON.
    """
    try:
        return files.parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"--results {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"--results {path} is not JSON ({error})") from None
