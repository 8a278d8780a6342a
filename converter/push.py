"""Publishing: a checkpoint as one commit of a Hub repository, whose large files can be sent ahead, one by one."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING

from converter.card import make_card
from converter.side_files import is_weights
from converter.source import CONFIG_NAME
from formats.errors import CheckpointError, HubError, Int4Error, UsageError, some
from formats.files import link_roots, read_small
from formats.hub import RemoteFile, fetch, hub_bars, hub_errors, list_files
from formats.manifest import (
    CARD_NAME,
    EVALUATION_NAME,
    MANIFEST_NAME,
    SHARD_SUFFIX,
    FileRecord,
    Manifest,
    read_manifest,
)
from formats.strict_json import parse_object

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion


@dataclass(frozen=True)
class Head:
    """What a repository holds now: its last commit, and the files of that."""

    commit: str
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Published:
    """What became of an upload: where on the Hub its commit is to see; None where there was nothing to commit."""

    repo_id: str
    url: str | None

    def __str__(self) -> str:
        return f"{self.repo_id}: {self.url or 'holds these files already, nothing to commit'}"


class Upload:
    """A checkpoint on its way to the Hub repository `repo_id`, which is made if there is none; use as a context.

    What is `put` is sent in a thread, one file at a time, while the caller goes on; `commit` sends what is left and
    makes one commit of all. The Hub is asked for every file whether it has its bytes already, so that the same upload,
    begun again after any stop, goes on.

    Entering raises `UsageError` for a name that is no Hub id, offline, and for a public repository that was to be
    `private`; `HubError` without the right to write, and where other weights are in the repository; `TemporaryError`.
    """

    def __init__(self, repo_id: str, *, private: bool = False, create_pr: bool = False, quiet: bool = False) -> None:
        self.repo_id = repo_id
        self._private = private
        self._create_pr = create_pr
        self._quiet = quiet
        self._sent: dict[FileRecord, CommitOperationAdd] = {}
        self._waiting: SimpleQueue[tuple[FileRecord, Path] | None] = SimpleQueue()
        self._stopped = Event()
        self._thread = Thread(target=self._run, daemon=True)  # an upload cannot be stopped; nobody is to wait for it

    def __enter__(self) -> "Upload":
        from huggingface_hub import HfApi  # here and below, because --help need not pay for importing it

        with hub_errors(self.repo_id, uploading=True):
            self._api = HfApi()
            made = self._api.create_repo(self.repo_id, private=self._private or None, exist_ok=True)
            self.repo_id = made.repo_id
            if self._private and not self._api.model_info(self.repo_id).private:
                raise UsageError(
                    f"{self.repo_id}: exists already, for all to see; leave --private out, or make it private in its "
                    "settings on the Hub"
                )
        if others := _other_weights(self._head().files):
            raise HubError(
                f"{self.repo_id}: holds the weights of another model ({some(others)}), whose configuration would be "
                "replaced; give an int4 checkpoint a repository of its own"
            )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def put(self, file: FileRecord, path: Path) -> None:
        """Have a finished file sent; what goes wrong is left to `commit`, which tries again."""
        self._waiting.put((file, path))

    def commit(self, folder: Path, manifest: Manifest) -> Published:
        """Make the checkpoint in `folder` the head of the repository, or a pull request.

        Nothing is done where the head, or an open pull request that an earlier call made, is so already. The card takes
        the place of the source's README.md; of other files only those go that the manifest before named and this one
        does not. Raises `CheckpointError` where the folder is not what the manifest says, `HubError`, and
        `TemporaryError`, after which the same call goes on.
        """
        self._stop()
        self._thread.join()
        made = {CARD_NAME: card_of(folder, manifest, self.repo_id), MANIFEST_NAME: manifest.to_bytes()}
        self._validate(made[CARD_NAME])
        head, title = self._head(), f"int4 checkpoint of {manifest.source.id}"
        files, others = self._changes(head, folder, manifest, made)
        if not files and not others:
            return Published(self.repo_id, None)
        for proposed in self._proposed(title) if self._create_pr else ():
            if not any(self._changes(self._head(proposed.git_reference), folder, manifest, made)):
                return Published(self.repo_id, proposed.url)
        with hub_errors(self.repo_id, uploading=True), hub_bars(self._quiet):
            done = self._api.create_commit(
                self.repo_id,
                [*self._send_rest(folder, files), *others],
                commit_message=title,
                create_pr=self._create_pr,
                parent_commit=head.commit,
            )
        return Published(self.repo_id, done.pr_url or done.commit_url)

    def _changes(
        self, head: Head, folder: Path, manifest: Manifest, made: Mapping[str, bytes]
    ) -> tuple[list[FileRecord], list["CommitOperationAdd | CommitOperationDelete"]]:
        """Which files of `folder` are to be sent to have `head` hold them and those `made`, and all else to be done."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = {file.name for file in manifest.files} | made.keys()
        files = [file for file in manifest.files if file.name not in made and not _has(head, file, folder / file.name)]
        new = [CommitOperationAdd(*item) for item in made.items() if not _has(head, _record(*item), item[1])]
        stale = [CommitOperationDelete(name) for name in sorted((self._listed(head) & head.files.keys()) - names)]
        return files, [*new, *stale]

    def _proposed(self, title: str) -> list["Discussion"]:
        """The pull requests of this `title` that nobody has closed: an earlier call made them."""
        with hub_errors(self.repo_id, uploading=True):
            found = self._api.get_repo_discussions(self.repo_id, discussion_type="pull_request")
            return [one for one in found if one.title == title and one.status in ("open", "draft")]

    def _stop(self) -> None:
        """Let the thread end behind the file that it sends."""
        self._stopped.set()
        self._waiting.put(None)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None and not self._stopped.is_set():
            try:
                self._send(*item)
            except Int4Error:  # `commit` meets it again, or it was temporary
                return

    def _send(self, file: FileRecord, path: Path) -> None:
        from huggingface_hub import CommitOperationAdd

        with hub_errors(self.repo_id, uploading=True), hub_bars(quiet=True):
            addition = CommitOperationAdd(file.name, path)
            self._api.preupload_lfs_files(self.repo_id, [addition], create_pr=self._create_pr, free_memory=False)
            self._sent[file] = addition

    def _send_rest(self, folder: Path, files: list[FileRecord]) -> list["CommitOperationAdd"]:
        """Send those of `files` that are not sent yet; what the client read of each is compared with its record."""
        from huggingface_hub import CommitOperationAdd

        additions = [self._sent.get(file) or CommitOperationAdd(file.name, folder / file.name) for file in files]
        self._api.preupload_lfs_files(self.repo_id, additions, create_pr=self._create_pr, free_memory=False)
        for file, addition in zip(files, additions, strict=True):
            if (found := addition.upload_info.sha256.hex()) != file.sha256:
                raise CheckpointError(
                    f"{folder / file.name}: was sent with the SHA-256 {found[:12]}…, the manifest says "
                    f"{file.sha256[:12]}…; it changed since, nothing is committed: convert again"
                )
        return additions

    def _head(self, revision: str | None = None) -> Head:
        with hub_errors(self.repo_id, uploading=True):
            commit = self._api.model_info(self.repo_id, revision=revision).sha
        if commit is None:
            raise HubError(f"{self.repo_id}: has no commit to begin from; make one on the Hub's website")
        return Head(commit, list_files(self.repo_id, commit))

    def _listed(self, head: Head) -> set[str]:
        """The files of the checkpoint that the repository holds now."""
        if MANIFEST_NAME not in head.files:
            return set()
        try:
            path = fetch(self.repo_id, head.commit, MANIFEST_NAME, quiet=True)
            return {file.name for file in read_manifest(path.parent).files}
        except CheckpointError:  # a manifest of something else
            return set()

    def _validate(self, card: bytes) -> None:
        """Ask the Hub about the YAML of a card, as its client does with a commit, but before anything large is sent."""
        with hub_errors(self.repo_id, uploading=True):
            try:
                self._api._validate_yaml(card.decode(), repo_type="model")
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise HubError(f"{self.repo_id}: {reason}; put a {CARD_NAME} of your own into the folder") from None


def _other_weights(names: Iterable[str]) -> list[str]:
    """Weights at the root of a repository that are none of this format, which its configuration may belong to."""
    return sorted(name for name in names if "/" not in name and is_weights(name) and not name.endswith(SHARD_SUFFIX))


def card_of(folder: Path, manifest: Manifest, repo_id: str) -> bytes:
    """The README.md of a checkpoint to publish.

    It is made from that of the source, which the conversion copied, and from the figures of int4-eval if they are in
    `folder`. One that somebody has written since goes as it is. Raises `CheckpointError`.
    """
    path, roots = folder / CARD_NAME, link_roots(folder)
    listed = {file.name: file for file in manifest.files}
    copied = listed.get(CARD_NAME)
    found = read_small(path, roots) if path.exists() else None
    if found is None and copied is not None:
        raise CheckpointError(f"{path}: is gone, which named the licence of the source; put it back, or your own there")
    try:
        text = "" if found is None else found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is no UTF-8 ({error.reason}); put a card of your own in its place") from None
    if found is not None and _record(CARD_NAME, found) != copied:
        return text.encode()
    figures = folder / EVALUATION_NAME
    is_ours = figures.exists() and EVALUATION_NAME not in listed  # a file of the source may have that name too
    measured = parse_object(read_small(figures, roots), str(figures)) if is_ours else None
    return make_card(repo_id, manifest, text, measured, _architecture(folder / CONFIG_NAME, roots)).encode()


def _architecture(config: Path, roots: tuple[Path, ...]) -> str | None:
    """The class of the model, as the first of `architectures` names it."""
    fields = parse_object(read_small(config, roots), str(config), constants=True) if config.exists() else {}
    names = fields.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _record(name: str, data: bytes) -> FileRecord:
    return FileRecord(name, len(data), hashlib.sha256(data).hexdigest())


def _has(head: Head, file: FileRecord, content: Path | bytes) -> bool:
    """Whether the repository holds `file` with this `content`."""
    from huggingface_hub.utils.sha import git_hash

    found = head.files.get(file.name)
    if found is None or found.size != file.size:
        return False
    if found.sha256 is not None:
        return found.sha256 == file.sha256
    return found.blob_id == git_hash(content if isinstance(content, bytes) else content.read_bytes())
