"""A small Hub on loopback: as much of the HTTP API as a push with huggingface_hub uses, repositories in memory.

Large files come by the LFS protocol (clients set HF_HUB_DISABLE_XET=1: Xet has servers of its own). It says no where
the real one does: an unknown token is 401, another organisation 403, what a token may not see 404.
"""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

MAX_REGULAR_BYTES = 1024
"""Larger files, and weights, are large files."""


@dataclass
class Repository:
    kind: str
    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})
    """Branch → its commits, each all files with their bytes."""
    messages: list[str] = field(default_factory=list)

    def commit_id(self, branch: str) -> str:
        return sha1(f"{branch} {len(self.branches[branch])}".encode()).hexdigest()

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.branches[branch][-1]

    def commits(self, branch: str = "main") -> int:
        return len(self.branches[branch]) - 1


class Answer(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message
        super().__init__(message)


class Hub:
    """What it holds, whom it knows, and how it fails next."""

    def __init__(self) -> None:
        self.address = ""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: dict[str, set[str]] = {}
        """Token → organisations that it may write to, and whose private repositories it sees."""
        self.objects: dict[str, bytes] = {}
        """Large files by sha256."""
        self.requests: list[str] = []
        self.failures: list[tuple[str, int]] = []
        """(part of a path, status): the next request that fits is answered so."""
        self.lock = threading.Lock()

    def model(self, name: str = "org/name") -> Repository:
        return self.repositories["model", name]

    def all_bytes(self) -> bytes:
        """Everything that was ever committed, with the messages."""
        contents = [
            data
            for repository in self.repositories.values()
            for commits in repository.branches.values()
            for files in commits
            for path, content in files.items()
            for data in (path.encode(), content)
        ]
        words = [message.encode() for repository in self.repositories.values() for message in repository.messages]
        return b"\n".join(contents + words)

    def answer(self, method: str, path: str, token: str, body: bytes) -> Any:
        """The JSON of an answer. Raises Answer."""
        for index, (part, status) in enumerate(self.failures):
            if part in path:
                del self.failures[index]
                raise Answer(status, message=f"as asked: {status}")
        if method == "PUT" and path.startswith("/lfs/"):  # a signed address: no token comes with it
            return self._store(path.removeprefix("/lfs/"), body)
        if token not in self.tokens:
            raise Answer(401, message="Invalid credentials in Authorization header")
        rights = self.tokens[token]
        if path == "/api/whoami-v2":
            role = "write" if rights else "read"
            return {"type": "user", "name": "someone", "auth": {"accessToken": {"role": role}}}
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), rights)
        if batch := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._find("model", batch[1], rights, writes=True)
            return self._batch(json.loads(body))
        found = re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([a-z]+)/([^/]+))?", path)
        if not found:
            raise Answer(404, message=f"no such path: {path}")
        repository = self._find(found[1], found[2], rights, writes=method == "POST")
        return self._of_repository(repository, found[2], found[3] or "revision", unquote(found[4] or "main"), body)

    def _of_repository(self, repository: Repository, name: str, verb: str, revision: str, body: bytes) -> Any:
        if verb == "branch":
            return self._branch(repository, revision)
        if revision not in repository.branches:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb == "revision":
            return {"id": name, "sha": repository.commit_id(revision), "private": repository.private, "siblings": []}
        if verb == "tree":
            return [_entry(path, data) for path, data in repository.files(revision).items()]
        if verb == "preupload":
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": _mode(f), "shouldIgnore": False} for f in files]}
        return self._commit(name, repository, revision, body)

    def _find(self, kind: str, name: str, rights: set[str], *, writes: bool) -> Repository:
        repository, organisation = self.repositories.get((kind, name)), name.partition("/")[0]
        if repository is None or (repository.private and organisation not in rights):
            raise Answer(404, "RepoNotFound", "Repository not found")
        if writes and organisation not in rights:
            raise Answer(403, message=f"You have no write access to {organisation}")
        return repository

    def _create(self, asked: dict[str, Any], rights: set[str]) -> Any:
        name, kind = f"{asked['organization']}/{asked['name']}", asked.get("type") or "model"
        if asked["organization"] not in rights:
            raise Answer(403, message=f"You don't have the rights to create a model under {asked['organization']}")
        if (kind, name) in self.repositories:
            raise Answer(409, message=f"You already created this {kind} repo")
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[kind, name] = Repository(kind=kind, private=private)
        return {"url": f"{self.address}/{name}"}

    def _branch(self, repository: Repository, branch: str) -> Any:
        if branch in repository.branches:
            raise Answer(409, message="the branch exists")
        repository.branches[branch] = [repository.files()]
        return {}

    def _batch(self, asked: dict[str, Any]) -> Any:
        def entry(wanted: dict[str, Any]) -> dict[str, Any]:
            if wanted["oid"] in self.objects:
                return wanted
            return {**wanted, "actions": {"upload": {"href": f"{self.address}/lfs/{wanted['oid']}?signature=x"}}}

        return {"transfer": "basic", "objects": [entry(wanted) for wanted in asked["objects"]]}

    def _store(self, oid: str, body: bytes) -> Any:
        if sha256(body).hexdigest() != oid:
            raise Answer(400, message="not these bytes")
        self.objects[oid] = body
        return {}

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> Any:
        files = dict(repository.files(branch))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                raise Answer(400, message=f"no such operation: {line['key']}")
        repository.branches[branch].append(files)
        commit = repository.commit_id(branch)
        return {"commitUrl": f"{self.address}/{name}/commit/{commit}", "commitOid": commit}


def _mode(file: dict[str, Any]) -> str:
    return "lfs" if _is_large(file["path"], file["size"]) else "regular"


def _is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > MAX_REGULAR_BYTES


def _entry(path: str, data: bytes) -> dict[str, Any]:
    oid = sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if _is_large(path, len(data)):
        entry |= {"oid": "0" * 40, "lfs": {"oid": sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return entry


@contextmanager
def run_hub() -> Iterator[Hub]:
    """A Hub that answers, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            with hub.lock:
                hub.requests.append(f"{self.command} {path}")
                try:
                    status, code, message, data = 200, "", "", hub.answer(self.command, path, token, body)
                except Answer as answer:
                    status, code, message, data = answer.status, answer.code, answer.message, {"error": str(answer)}
            content = json.dumps(data).encode()
            self.send_response(status)
            for name, value in {"X-Error-Code": code, "X-Error-Message": message}.items():
                if value:
                    self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()
