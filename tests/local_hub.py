"""A stand-in for the Hugging Face Hub: one repository on 127.0.0.1, and the failures that a test asks for."""

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

DROP = 0  # as a status: the connection is closed without an answer
LFS_SUFFIXES = (".safetensors", ".bin")


class Request(NamedTuple):
    """What the client asked; `path` is decoded and has no query."""

    method: str
    path: str
    authorization: str | None
    range: str | None = None


class Answer(NamedTuple):
    """What it is told."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


class LocalHub:
    """Answers for the repository `repo` at `url` while its context is open.

    `requests` lists what was asked; `on_request` is called with each request before its answer is found. Of files in
    `damaged` a byte is another than it should be; those in `cut` end in the middle, once; without `ranges` every answer
    is the whole file.
    """

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self.requests: list[Request] = []
        self.on_request: Callable[[Request], None] = lambda request: None
        self.damaged: set[str] = set()
        self.cut: set[str] = set()
        self.ranges = True
        self._commits: dict[str, dict[str, bytes]] = {}
        self._branches: dict[str, str] = {}
        self._failures: list[tuple[str, Answer, Iterator[int]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make `files` the head of `branch` and return its commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._commits[commit] = dict(files)
        self._branches[branch] = commit
        return commit

    def fail(
        self,
        status: int,
        code: str | None = None,
        *,
        path: str = "*",
        message: str | None = None,
        retry_after: str | None = None,
        times: int | None = None,
    ) -> None:
        """Answer requests for paths that match the glob `path` with `status` and an error code, so many `times`."""
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Retry-After": retry_after}
        answer = Answer(status, {name: text for name, text in headers.items() if text})
        self._failures.append((path, answer, itertools.count() if times is None else iter(range(times))))

    def files_asked_for(self) -> set[tuple[str, str]]:
        """The (revision, name) of every file whose bytes or metadata were asked for."""
        marked = [request.path.partition(f"/{self.repo}/resolve/")[2] for request in self.requests]
        return {(path.partition("/")[0], path.partition("/")[2]) for path in marked if path}

    def answer(self, request: Request) -> Answer:
        """Note `request` and find its answer."""
        self.requests.append(request)
        self.on_request(request)
        for pattern, failure, times in self._failures:
            if fnmatchcase(request.path, pattern) and next(times, None) is not None:
                return failure
        for prefix in (f"/{self.repo}/", f"/api/models/{self.repo}/"):
            if f"{request.path}/".startswith(prefix):
                kind, _, rest = request.path.removeprefix(prefix.rstrip("/")).lstrip("/").partition("/")
                revision, _, name = rest.partition("/")
                return self._ranged(request, self._answer(kind, revision or "main", name), name)
        return Answer(404, {"X-Error-Code": "RepoNotFound"})

    def _ranged(self, request: Request, answer: Answer, name: str) -> Answer:
        body = answer.body
        if name in self.damaged and request.method == "GET":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if request.range is None or not self.ranges or answer.status != 200:
            return answer._replace(body=body)
        first, _, last = request.range.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(body)), len(body) - 1)
        headers = {**answer.headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"}
        return Answer(206, headers, body[start : end + 1])

    def _answer(self, kind: str, revision: str, name: str) -> Answer:
        commit = self._branches.get(revision, revision)
        if commit not in self._commits:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = self._commits[commit]
        if kind == "tree":
            return _json([_tree_entry(*file) for file in sorted(files.items())])
        if kind != "resolve":
            return _json({"id": self.repo, "sha": commit, "siblings": [{"rfilename": name} for name in sorted(files)]})
        if name not in files:
            return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return _file(name, files[name], commit)


def _json(value: object) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _git_id(data)}
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {**entry, "lfs": lfs} if name.endswith(LFS_SUFFIXES) else entry


def _file(name: str, data: bytes, commit: str) -> Answer:
    headers = {"ETag": f'"{_git_id(data)}"', "X-Repo-Commit": commit}
    if name.endswith(LFS_SUFFIXES):
        headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
    return Answer(200, headers, data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def __init__(self, hub: LocalHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, self.headers["Authorization"], self.headers["Range"])
        answer = self.hub.answer(request)
        if answer.status == DROP:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if (name := path.rpartition("/")[2]) in self.hub.cut and answer.status == 200:
            self.hub.cut.remove(name)
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.close_connection = True
            return
        self.wfile.write(answer.body)

    do_GET = do_HEAD = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass
