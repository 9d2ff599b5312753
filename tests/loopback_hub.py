"""A hub on this machine, for the real ``huggingface_hub`` client: repositories kept in memory.

It answers what reading and writing repositories asks of the real one (whoami, create, preupload,
commit, branches, revision, tree, paths-info, resolve with ranges, LFS), and fails as
told: :meth:`LoopbackHub.fail` answers with a status, :meth:`LoopbackHub.cut` breaks a connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
import yaml

OWNER, READER = "hf_loopbackOwner", "hf_loopbackReader"
USERS = {OWNER: "owner", READER: "reader"}
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "other"}
LFS_SUFFIXES = (".safetensors", ".parquet")


def blob_id(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Files at every commit, and what points at commits."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: Mapping[str, bytes], title: str = "a commit") -> str:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        self.titles.append(title)
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        sha = self.sha(revision)
        assert sha is not None
        return self.commits[sha]


class LoopbackHub(ThreadingHTTPServer):
    """The server; ``url`` is its endpoint."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str, bytes]] = []
        self.resumed: list[tuple[str, int]] = []
        self._faults: list[list[Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(
        self,
        name: str,
        files: Mapping[str, bytes] | Path,
        *,
        repo_type: str = "model",
        ref: str = "main",
        **settings: bool,
    ) -> Repository:
        """A repository with one commit of these files, or of a folder's."""
        if isinstance(files, Path):
            files = {one.name: one.read_bytes() for one in files.iterdir() if one.is_file()}
        made = self.repositories.setdefault((repo_type, name), Repository(name, **settings))
        made.commit(ref, files)
        return made

    def fail(self, method: str, part: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer the next requests whose path holds ``part`` with a status."""
        self._faults.append([method, part, times, status, headers])

    def cut(self, part: str) -> None:
        """Break off the next answer to a GET whose path holds ``part``, halfway."""
        self._faults.append(["GET", part, 1, "cut", {}])

    def fault(self, method: str, path: str) -> tuple[Any, dict[str, str]] | None:
        for one in self._faults:
            if one[0] == method and one[1] in path and one[2] > 0:
                one[2] -= 1
                return one[3], one[4]
        return None

    def sent(self, method: str, part: str) -> list[tuple[str, str, str, bytes]]:
        """Requests seen so far: method, path, token, body."""
        return [one for one in self.requests if one[0] == method and part in one[1]]

    @contextmanager
    def serving(self) -> Iterator[LoopbackHub]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a fresh process needs to use this hub and its own cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        }

    def enter(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = None) -> None:
        """Let this process's client use this hub, with a cache of its own, until the patch ends."""
        from huggingface_hub import constants

        patch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setenv("NO_PROXY", "*")
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)


def card_problems(content: str) -> list[str]:
    """What the hub would refuse in a card's metadata, by its specification of model cards."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no metadata"]
    head = yaml.safe_load(match[1])
    problems = []
    if "base_model" in head and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(head["base_model"])):
        problems.append("base_model is not the id of a model")
    if head.get("license", "mit") not in LICENSES:
        problems.append("license must be one of the hub's")
    for one in head.get("datasets", []):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", one):
            problems.append("datasets holds what is no id")
    for model in head.get("model-index", []):
        for result in model["results"]:
            complete = result["task"]["type"] and result["dataset"]["type"]
            if not complete or not all("value" in one for one in result["metrics"]):
                problems.append("model-index is not complete")
    return problems


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self.body = b"".join(parts)
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = USERS.get(self.token)
        self.server.requests.append((self.command, self.path, self.token, self.body))
        self.cutting = False
        fault = self.server.fault(self.command, unquote(self.path))
        if fault is not None and fault[0] == "cut":
            self.cutting = True
        elif fault is not None:
            return self._answer(b'{"error": "told to fail"}', fault[1], fault[0])
        bare = self.path.partition("?")[0]
        # A revision may hold slashes: they come quoted, so the path is split first.
        parts = [unquote(one) for one in bare.strip("/").split("/")]
        if self.token and self.user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if parts[0] == "api":
            return self._api(parts[1:])
        if parts[0] == "large":
            return self._put_large(parts[1])
        if parts[-4:-1] == ["info", "lfs", "objects"]:
            return self._batch()
        repo_type = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[repo_type == "dataset" :]
        return self._resolve(repo_type, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _api(self, parts: list[str]) -> None:
        if parts[0] == "whoami-v2":
            if self.user is None:
                return self._error(401, "", "Invalid credentials in Authorization header")
            return self._json({"type": "user", "name": self.user, "orgs": []})
        if parts[0] == "validate-yaml":
            return self._validate(json.loads(self.body)["content"])
        if parts[:2] == ["repos", "create"]:
            return self._create(json.loads(self.body))
        repo_type, name, rest = parts[0].removesuffix("s"), "/".join(parts[1:3]), parts[3:]
        repository = self._repository(repo_type, name)
        if repository is None:
            return None
        what = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        writes = what in ("preupload", "commit", "branch")
        if writes and self.user != name.split("/")[0]:
            return self._error(403, "", "You don't have the required permissions")
        if what == "branch":
            if revision in repository.refs:
                return self._error(409, "", "Reference already exists")
            repository.refs[revision] = repository.refs["main"]
            return self._json({})
        sha = repository.sha(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        files = repository.commits[sha]
        if what == "tree":
            return self._json([self._entry(path, files[path]) for path in sorted(files)])
        if what == "paths-info":
            paths = parse_qs(self.body.decode()).get("paths", [])
            return self._json([self._entry(path, files[path]) for path in paths if path in files])
        if what == "preupload":
            return self._json({"files": [self._mode(one, files) for one in self._files()]})
        if what == "commit":
            return self._commit(repository, revision, sha)
        siblings = [{"rfilename": path} for path in sorted(files)]
        facts = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
        return self._json(facts)

    def _repository(self, repo_type: str, name: str) -> Repository | None:
        found = self.server.repositories.get((repo_type, name))
        if found is None or (found.private and self.user != name.split("/")[0]):
            self._error(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        if found.gated and self.user != name.split("/")[0]:
            self._error(403, "GatedRepo", "Access to this model is restricted")
            return None
        return found

    def _files(self) -> list[dict[str, Any]]:
        return json.loads(self.body)["files"]

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        entry["oid"] = blob_id(content)
        if path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        return entry

    def _mode(self, asked: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
        path = asked["path"]
        large = path.endswith(LFS_SUFFIXES)
        mode = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in files:
            content = files[path]
            mode["oid"] = hashlib.sha256(content).hexdigest() if large else blob_id(content)
        return mode

    def _commit(self, repository: Repository, ref: str, sha: str) -> None:
        files = dict(repository.commits[sha])
        header: dict[str, Any] = {}
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.large:
                    return self._error(400, "", "an LFS object is missing")
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        parent = header.get("parentCommit")
        if parent is not None and parent != sha:
            return self._error(412, "", "A commit has happened since. Please refresh and try again")
        new = repository.commit(ref, files, header["summary"])
        url = f"{self.server.url}/{repository.name}/commit/{new}"
        return self._json({"success": True, "commitUrl": url, "commitOid": new})

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or self.user
        name, key = f"{owner}/{asked['name']}", (asked.get("type") or "model")
        if (key, name) in self.server.repositories:
            return self._error(409, "", "You already created this model repo")
        if owner != self.user:
            return self._error(403, "", f"You don't have the rights to create under {owner}")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.add(name, {".gitattributes": b"*.safetensors lfs\n"}, private=private)
        return self._json({"url": f"{self.server.url}/{name}", "name": name})

    def _validate(self, content: str) -> None:
        problems = card_problems(content)
        errors = [{"message": one} for one in problems]
        body = {"errors": errors, "warnings": []}
        return self._json(body, status=400 if problems else 200)

    def _batch(self) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            if one["oid"] not in self.server.large:
                href = f"{self.server.url}/large/{one['oid']}"
                one = {**one, "actions": {"upload": {"href": href}}}
            objects.append(one)
        return self._json({"transfer": "basic", "objects": objects})

    def _put_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "", "the content is not what its name says")
        self.server.large[oid] = self.body
        return self._answer(b"", {})

    def _resolve(self, repo_type: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(repo_type, name)
        if repository is None:
            return None
        sha = repository.sha(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        content = repository.commits[sha].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return self._answer(content, headers)
        start, last = int(asked[1]), len(content) - 1
        self.server.resumed.append((path, start))
        headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        return self._answer(content[start:], headers, 206)

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(json.dumps({"error": message}).encode(), headers, status)

    def _answer(self, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if self.cutting else body)
        self.close_connection = self.close_connection or self.cutting
