"""A repository of the stand-in for the Hub: commits, branches and large files, and what an upload changes of them."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin")
NEW = {".gitattributes": b"*.safetensors filter=lfs\n"}  # what the Hub puts into a new repository


class RefusedError(Exception):
    """The Hub says no, with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Repository:
    """Commits of files by name; `stored` are the large ones, by SHA-256, committed or not.

    `proposals` are the titles of pull requests, whose branches are `refs/pr/1` and so on.
    """

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.stored: dict[str, bytes] = {}
        self.proposals: list[str] = []

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit; raises `KeyError`."""
        return self.commits[self.branches.get(revision, revision)]

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make `files` the head of `branch` and return its commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        self.stored |= {sha256(data): data for name, data in files.items() if name.endswith(LFS_SUFFIXES)}
        return commit

    def preupload(self, asked: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """How each of the files `asked` for is to be sent, and what stands under its name."""
        head = self.files()
        answers = []
        for path in (file["path"] for file in asked):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": (sha256 if mode == "lfs" else git_id)(head[path])} if path in head else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers}

    def batch(self, objects: Iterable[Mapping[str, Any]], url: str) -> dict[str, Any]:
        """Where each of the large `objects` is to be put; nowhere where it is stored already."""
        return {
            "transfer": "basic",
            "objects": [
                {"oid": asked["oid"], "size": asked["size"]}
                | ({} if asked["oid"] in self.stored else {"actions": {"upload": {"href": f"{url}/{asked['oid']}"}}})
                for asked in objects
            ],
        }

    def put(self, oid: str, data: bytes) -> None:
        """Store a large file that is what its name says."""
        if sha256(data) != oid:
            raise RefusedError(400)
        self.stored[oid] = data

    def commit(self, body: bytes, *, proposed: bool) -> str:
        """Make the commit of NDJSON `body` the head, or a pull request, as the Hub does: whole, or not at all."""
        operations = [json.loads(line) for line in body.splitlines()]
        header = operations.pop(0)["value"]
        if header.get("parentCommit") not in (None, self.branches["main"]):
            raise RefusedError(412)
        files = dict(self.files())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif operation["key"] == "lfsFile" and value["oid"] in self.stored:
                files[value["path"]] = self.stored[value["oid"]]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                raise RefusedError(400)
        if proposed:
            self.proposals.append(header["summary"])
        return self.push(files, f"refs/pr/{len(self.proposals)}" if proposed else "main")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()
