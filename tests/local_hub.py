"""A stand-in for the Hugging Face Hub: repositories on 127.0.0.1, and the failures that a test asks for."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from local_repository import LFS_SUFFIXES, NEW, RefusedError, Repository, git_id, sha256

REPO = "owner/name"
TOKEN = "hf_aSecretThatNobodyMaySee"
DROP = 0  # as a status: the connection is closed without an answer
USER = "me"  # whose token it is
UPLOADS = "/uploads"


class Request(NamedTuple):
    """What the client asked; `path` is decoded and has no query."""

    method: str
    path: str
    authorization: str | None
    range: str | None = None
    query: str = ""
    body: bytes = b""


class Answer(NamedTuple):
    """What it is told."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


class LocalHub:
    """Answers for the repository `repo`, and others that it is asked to make, at `url` while its context is open.

    `requests` lists what was asked; `on_request` is called with each request before its answer is found. Of files in
    `damaged` a byte is another than it should be; those in `cut` end in the middle, once; without `ranges` every answer
    is the whole file. What is wrong with every card is `invalid_card`.
    """

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self.requests: list[Request] = []
        self.on_request: Callable[[Request], None] = lambda request: None
        self.damaged: set[str] = set()
        self.cut: set[str] = set()
        self.ranges = True
        self.invalid_card: str | None = None
        self.repositories = {repo: Repository()}
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
        return self.repositories[self.repo].push(files, branch)

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
        try:
            return self._reading(request) if request.method in ("GET", "HEAD") else self._writing(request)
        except RefusedError as refused:
            return Answer(refused.status, {}, b"{}")

    def _reading(self, request: Request) -> Answer:
        for repo in self.repositories:
            for prefix in (f"/{repo}/", f"/api/models/{repo}/"):
                if f"{request.path}/".startswith(prefix):
                    kind, _, rest = request.path.removeprefix(prefix.rstrip("/")).lstrip("/").partition("/")
                    if kind == "discussions":
                        return self._discussions(repo)
                    revision, _, name = rest.partition("/") if not rest.startswith("refs/pr/") else (rest, "", "")
                    return self._ranged(request, self._answer(repo, kind, revision or "main", name), name)
        return Answer(404, {"X-Error-Code": "RepoNotFound"})

    def _writing(self, request: Request) -> Answer:
        folder, _, last = request.path.rpartition("/")
        if folder == UPLOADS:
            for repository in self.repositories.values():
                repository.put(last, request.body)
            return _json({})
        if request.path == "/api/validate-yaml":
            errors = [{"message": self.invalid_card}] if self.invalid_card else []
            return _json({"errors": errors, "warnings": []})._replace(status=400 if errors else 200)
        if request.path == "/api/repos/create":
            return self._create(json.loads(request.body))
        for repo, repository in self.repositories.items():
            if request.path == f"/{repo}.git/info/lfs/objects/batch":
                return _json(repository.batch(json.loads(request.body)["objects"], self.url + UPLOADS))
            if folder == f"/api/models/{repo}/preupload":
                return _json(repository.preupload(json.loads(request.body)["files"]))
            if folder == f"/api/models/{repo}/commit":
                return self._commit(repo, request)
        return Answer(404, {"X-Error-Code": "RepoNotFound"})

    def _create(self, asked: Mapping[str, Any]) -> Answer:
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        url = {"url": f"{self.url}/{repo}"}
        if repo in self.repositories:
            return _json(url)._replace(status=409)
        self.repositories[repo] = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        self.repositories[repo].push(NEW)
        return _json(url)

    def _commit(self, repo: str, request: Request) -> Answer:
        proposed, repository = "create_pr=1" in request.query, self.repositories[repo]
        commit = repository.commit(request.body, proposed=proposed)
        urls = {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit}
        page = f"{self.url}/{repo}/discussions/{len(repository.proposals)}"
        return _json(urls | {"pullRequestUrl": page if proposed else None})

    def _discussions(self, repo: str) -> Answer:
        found = [
            {
                "title": title, "num": number, "status": "open", "isPullRequest": True, "author": {"name": USER},
                "createdAt": "2024-05-06T07:08:09.000Z", "repo": {"name": repo, "type": "model"},
            }
            for number, title in enumerate(self.repositories[repo].proposals, 1)
        ]  # fmt: skip
        return _json({"discussions": found, "count": len(found), "start": 0})

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

    def _answer(self, repo: str, kind: str, revision: str, name: str) -> Answer:
        repository = self.repositories[repo]
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if kind == "tree":
            return _json([_tree_entry(*file) for file in sorted(files.items())])
        if kind != "resolve":
            siblings = [{"rfilename": name} for name in sorted(files)]
            return _json({"id": repo, "sha": commit, "private": repository.private, "siblings": siblings})
        if name not in files:
            return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return _file(name, files[name], commit)


def _json(value: object) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
    lfs = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
    return {**entry, "lfs": lfs} if name.endswith(LFS_SUFFIXES) else entry


def _file(name: str, data: bytes, commit: str) -> Answer:
    headers = {"ETag": f'"{git_id(data)}"', "X-Repo-Commit": commit}
    if name.endswith(LFS_SUFFIXES):
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
    return Answer(200, headers, data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def __init__(self, hub: LocalHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        body = b"".join(self._body())
        headers = self.headers["Authorization"], self.headers["Range"]
        request = Request(self.command, path, *headers, address.query, body)
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

    def _body(self) -> Iterator[bytes]:
        """What the client sends, of a length that it says, or in chunks."""
        if self.headers["Transfer-Encoding"] != "chunked":
            yield self.rfile.read(int(self.headers["Content-Length"] or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass
