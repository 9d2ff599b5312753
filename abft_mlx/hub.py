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
_LOGIN_IN_URL = re.compile(r"(?<=:)//[^\s/@]+@")
_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[\w][\w.+-]*(/[\w][\w.+-]*)*", re.ASCII)
_LONGEST_REASON = 200

Watcher = Callable[[str, int, int], None]
_watcher: ContextVar[Watcher | None] = ContextVar("hub_watcher", default=None)


@dataclass(frozen=True)
class Asked:
    """What was asked of the hub, in the words of whoever asked.

    Attributes:
        title: names it in messages, such as ``model owner/name``.
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
    """Why a request failed.

    Attributes:
        kind: what to tell programs.
        message: one line for a person, with the way out.
    """

    kind: Kind
    message: str

    def __post_init__(self) -> None:
        """See that no token is in the message, whatever the hub or a library said."""
        object.__setattr__(self, "message", masked(self.message))

    @property
    def refused(self) -> bool:
        """Whether trying again is of no use."""
        return self.kind in REFUSALS


def masked(text: str) -> str:
    """A text without the hub's token, anything that looks like one, and logins in URLs."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    return _LOGIN_IN_URL.sub("//", _TOKEN_LIKE.sub("***", text))


def is_id(name: str) -> bool:
    """Whether a name has the form owner/name; ``..`` and other ways out of a folder have not."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def split_revision(name: str) -> tuple[str, str | None] | None:
    """The id and the revision of ``owner/name`` or ``owner/name@revision``; None if it is neither.

    A revision that would lead out of the cache's folders, such as ``../x``, is not one.
    """
    identity, at, revision = name.partition("@")
    if not is_id(identity) or (at and not is_revision(revision)):
        return None
    return identity, revision if at else None


def is_revision(name: str) -> bool:
    """Whether a name can be a branch, a tag or a commit, and leads out of no folder."""
    return _REVISION.fullmatch(name) is not None and ".." not in name


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

    with bars(name) as chosen:
        return Path(
            snapshot_download(
                name,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=[*patterns],
                tqdm_class=chosen,
            )
        )


def file(name: str, path: str, *, revision: str | None = None, repo_type: str = "dataset") -> Path:
    """The local copy of one file of a repository; downloaded once, then read from the cache.

    Args:
        name: a hub id.
        path: the file's path in it.
        revision: branch, tag or commit.
        repo_type: as :func:`snapshot`.

    Raises:
        Exception: as :func:`snapshot`.
    """
    from huggingface_hub import hf_hub_download

    with bars(name) as chosen:
        return Path(
            hf_hub_download(name, path, repo_type=repo_type, revision=revision, tqdm_class=chosen)
        )


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Have downloads and uploads tell a function how far they are, in place of the library's bars.

    Args:
        watcher: told a repository's name, bytes done and bytes in all as far as known; of
            downloads only, and from several threads, though never at once.
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

    Args:
        name: what the watcher is told that the bytes are of.
    """
    watcher = _watcher.get()
    if watcher is None:
        yield None
        return
    from huggingface_hub import constants, utils

    # What the user's environment says of bars cannot be changed, and trying warns.
    ours = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled()
    if ours:
        utils.disable_progress_bars()
    try:
        yield _telling(watcher, name)
    finally:
        if ours:
            utils.enable_progress_bars()


def _telling(watcher: Watcher, title: str) -> type[Any]:
    """A class of bars that draw nothing and tell of bytes."""
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()

    class Telling(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Bytes from the network and bytes on the disk have a bar each; one of them will do.
            network = str(kwargs.get("name", "")).endswith(".transfer")
            self._tells = kwargs.get("unit") == "B" and not network
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                self.n += n or 0
                if self._tells:
                    watcher(title, int(self.n), int(self.total or 0))
            return None

    return Telling


def explain(error: BaseException, asked: Asked) -> Failure:
    """What an exception that a request to the hub ended with means.

    Args:
        error: what was raised.
        asked: what was asked for.

    Raises:
        BaseException: ``error`` itself, where it is not one of the hub's, of the network's or of
            the operating system's: that is a bug.
    """
    from huggingface_hub import errors

    original, cause = error, error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and _status(cause) is not None:
        error = cause or error  # the hub did answer, only not with the files
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__  # an upload's own failure, wrapped
    at = f" at revision {asked.revision!r}" if asked.revision else ""
    title, status, reason = f"{asked.title}{at}", _status(error) or 0, _first_line(error)
    again, network = f"{title} could not be {asked.doing}", ("TransportError", "ConnectionError")
    rows: list[tuple[bool, Kind, str]] = [
        (isinstance(error, errors.GatedRepoError), "gated",
         f"{asked.title} is gated: accept its terms on the hub, then {LOGIN}"),
        (isinstance(error, errors.RepositoryNotFoundError), "absent",
         f"{asked.absent}; check the spelling, or {LOGIN} if it is private"),
        (isinstance(error, errors.RevisionNotFoundError), "revision",
         f"{asked.title} has no revision {asked.revision!r}; {asked.any_revision}"),
        (status == 401, "token", f"{again}: the hub does not accept the token; {LOGIN}"),
        (status == 403, "forbidden",
         f"{again}: the token has no right to it; ask for access, or {LOGIN} with one that has"),
        (status == 429, "limit", f"{again}: too many requests (429); wait some minutes, try again"),
        (status >= 500, "server", f"{again}: the hub is in trouble ({status}); try again later"),
        (isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled), "offline",
         f"{title} is not in the local cache and the hub cannot be reached; go online once to "
         f"fetch it, or {asked.instead}"),
        # The hub's library has changed its HTTP library twice; all of them name these alike.
        (any(kind.__name__ in network for kind in type(error).__mro__), "offline",
         f"{again}: the hub cannot be reached ({reason}); go online and try again"),
        (isinstance(error, errors.HfHubHTTPError | errors.HFValidationError | OSError), "other",
         f"{again}: {reason}; try again, or {asked.instead}"),
        (isinstance(error, json.JSONDecodeError), "server",
         f"{again}: the hub's answer is no JSON; try again later"),
        # The library refuses names such as ../x; others it cannot make a path of.
        (asked.doing == "fetched" and isinstance(error, ValueError | RecursionError), "name",
         f"{again}: it holds a file whose name leads out of its folder or is no name of a file "
         f"({reason}); {asked.instead}"),
    ]  # fmt: skip
    for matches, kind, message in rows:
        if matches:
            return Failure(kind, message)
    raise original


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that a request was answered with, if that is what failed."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _first_line(error: BaseException) -> str:
    """What an error says first, without a token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return masked(lines[0] if lines else type(error).__name__)[:_LONGEST_REASON]
