"""The hub: one way to fetch a repository's files, and one clear line for each way it can fail."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "gated", "absent", "revision", "token", "forbidden", "name",
    "offline", "limit", "server", "other",
]  # fmt: skip

# What the user asked for cannot be had; with any other kind a later try may succeed.
REFUSALS = frozenset({"gated", "absent", "revision", "token", "forbidden", "name"})
LOGIN = "run hf auth login"
_TOKEN_LIKE = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_LOGIN_IN_URL = re.compile(r"(?<=://)[^\s/@]+@")
_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[\w][\w.+-]*(/[\w][\w.+-]*)*", re.ASCII)

Watcher = Callable[[str, int, int], None]
_watcher: ContextVar[Watcher | None] = ContextVar("hub_watcher", default=None)


@dataclass(frozen=True)
class Request:
    """What was asked of the hub, in words for a message.

    Attributes:
        title: names it, such as ``model owner/name``.
        absent: the message's beginning where there is no such repository.
        instead: what else the user may give, such as ``give a local folder``.
        revision: branch, tag or commit, if one was named.
        any_revision: the way out where there is no such revision.
        doing: what could not be done to it.
    """

    title: str
    absent: str
    instead: str
    revision: str | None = None
    any_revision: str = "leave it out for the newest"
    doing: str = "fetched"


@dataclass(frozen=True)
class Failure:
    """Why a request failed: a kind for programs, and one line for a person, with the way out."""

    kind: Kind
    message: str

    @property
    def refused(self) -> bool:
        """Whether trying again is of no use."""
        return self.kind in REFUSALS


def masked(text: str) -> str:
    """A text without the hub's token, anything that looks like one, and logins in URLs."""
    from huggingface_hub import get_token

    text = text.replace(get_token() or "\0", "***")
    return _LOGIN_IN_URL.sub("", _TOKEN_LIKE.sub("***", text))


def is_id(name: str) -> bool:
    """Whether a name has the form owner/name; ``..`` and other ways out of a folder have not."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_revision(name: str) -> bool:
    """Whether a name can be a branch, a tag or a commit, and leads out of no folder."""
    return _REVISION.fullmatch(name) is not None and ".." not in name


def split_revision(name: str) -> tuple[str, str | None] | None:
    """Id and revision of ``owner/name`` or ``owner/name@revision``; None if it is neither."""
    identity, at, revision = name.partition("@")
    if not is_id(identity) or (at and not is_revision(revision)):
        return None
    return identity, revision if at else None


def snapshot(
    name: str, patterns: Sequence[str], *, revision: str | None = None, repo_type: str = "model"
) -> Path:
    """The local folder of a repository's files; downloaded once, then read from the cache.

    A download that was cut short goes on where it stopped. Without a network the cache's copy is
    taken, if it is whole.

    Args:
        name: a hub id.
        patterns: names of the files that are wanted, with wildcards; no others are fetched.
        revision: branch, tag or commit.
        repo_type: "model", which adapters are, too, or "dataset".

    Raises:
        Exception: the hub library's own; :func:`explain` has one line for each.
    """
    from huggingface_hub import snapshot_download

    with bars(name) as kind:
        return Path(
            snapshot_download(
                name,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=[*patterns],
                tqdm_class=kind,
            )
        )


def file(name: str, path: str, *, revision: str | None = None, repo_type: str = "dataset") -> Path:
    """The local copy of one file of a repository; otherwise as :func:`snapshot`."""
    from huggingface_hub import hf_hub_download

    with bars(name) as kind:
        return Path(
            hf_hub_download(name, path, repo_type=repo_type, revision=revision, tqdm_class=kind)
        )


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Report the progress of downloads to a function, not in the library's own bars.

    It gets a repository's name, bytes done and bytes in all as far as known; from several threads,
    though never at once.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextlib.contextmanager
def bars(name: str) -> Iterator[type[Any] | None]:
    """The class of progress bars for the hub's library; None, for its own, where nobody watches.

    While the block runs, a watched library draws no bars itself.
    """
    watcher = _watcher.get()
    if watcher is None:
        yield None
        return
    report: Watcher = watcher
    from huggingface_hub import constants, utils

    # What the user's environment says of bars cannot be changed, and trying warns.
    ours = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled()
    if ours:
        utils.disable_progress_bars()
    lock = threading.Lock()

    class Reporting(utils.tqdm):
        """Bars that draw nothing and report bytes."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Bytes from the network and bytes on the disk have a bar each; one of them will do.
            network = str(kwargs.get("name", "")).endswith(".transfer")
            self._counts = kwargs.get("unit") == "B" and not network
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                self.n += n or 0
                if self._counts:
                    report(name, int(self.n), int(self.total or 0))
            return None

    try:
        yield Reporting
    finally:
        if ours:
            utils.enable_progress_bars()


def explain(error: BaseException, request: Request) -> Failure:
    """What an exception that a request to the hub ended with means.

    Raises:
        BaseException: ``error`` itself, where it is not one of the hub's, of the network's or of
            the operating system's: that is a bug.
    """
    from huggingface_hub import errors

    original, cause = error, error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and _status(cause):
        error = cause or error  # the hub did answer, only not with the files
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__  # an upload's own failure, wrapped
    at = f" at revision {request.revision!r}" if request.revision else ""
    title, status, reason = f"{request.title}{at}", _status(error), first_line(error)
    again, network = f"{title} could not be {request.doing}", ("TransportError", "ConnectionError")
    rows: list[tuple[bool, Kind, str]] = [
        (isinstance(error, errors.GatedRepoError), "gated",
         f"{request.title} is gated: accept its terms on the hub, then {LOGIN}"),
        (isinstance(error, errors.RepositoryNotFoundError), "absent",
         f"{request.absent}; check the spelling, or {LOGIN} if it is private"),
        (isinstance(error, errors.RevisionNotFoundError), "revision",
         f"{request.title} has no revision {request.revision!r}; {request.any_revision}"),
        (status == 401, "token", f"{again}: the hub does not accept the token; {LOGIN}"),
        (status == 403, "forbidden",
         f"{again}: the token has no right to it; ask for access, or {LOGIN} with one that has"),
        (status == 429, "limit", f"{again}: too many requests (429); wait some minutes, try again"),
        (status >= 500, "server", f"{again}: the hub is in trouble ({status}); try again later"),
        (isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled), "offline",
         f"{title} is not in the local cache and the hub cannot be reached; go online once to "
         f"fetch it, or {request.instead}"),
        # The hub's library has changed its HTTP library twice; all of them name these alike.
        (any(kind.__name__ in network for kind in type(error).__mro__), "offline",
         f"{again}: the hub cannot be reached ({reason}); go online and try again"),
        (isinstance(error, errors.HfHubHTTPError | errors.HFValidationError | OSError), "other",
         f"{again}: {reason}; try again, or {request.instead}"),
        (isinstance(error, json.JSONDecodeError), "server",
         f"{again}: the hub's answer is no JSON; try again later"),
        # The library refuses names such as ../x; others it cannot make a path of.
        (request.doing == "fetched" and isinstance(error, ValueError | RecursionError), "name",
         f"{again}: a file's name in it is not valid here ({reason}); {request.instead}"),
    ]  # fmt: skip
    for matches, kind, message in rows:
        if matches:
            return Failure(kind, masked(message))
    raise original


def _status(error: BaseException | None) -> int:
    """The HTTP status that a request was answered with; 0 where something else failed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else 0


def first_line(error: BaseException) -> str:
    """What an error says first, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return masked(lines[0] if lines else type(error).__name__)[:200]
