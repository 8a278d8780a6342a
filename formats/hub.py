"""What comes from the Hugging Face Hub, by huggingface_hub, with its errors in this project's terms."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import PARTIAL_CONTENT
from pathlib import Path
from traceback import walk_tb

from formats.errors import HubError, Int4Error, OutputError, TemporaryError, UsageError
from formats.progress import bar_class, draws_bars

BUSY = (408, 409, 412, 425, 429)  # 409 and 412: somebody else changes the repository
CACHE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
UNREACHABLE = "is the Hub within reach? check the network and run again"
TRANSPORTS = ("httpx", "httpcore", "h11", "requests", "urllib3", "hf_xet")  # beginnings of module names


def download(
    repo_id: str,
    revision: str | None = None,
    *,
    allow: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    repo_type: str = "model",
    quiet: bool = False,
) -> Path:
    """Fetch a repository's files into the Hub cache and return the snapshot folder, whose name is the commit.

    `allow` and `ignore` are glob patterns of file names. Raises `HubError`, `TemporaryError`, `UsageError`, or
    `OutputError` where the cache cannot be written.
    """
    from huggingface_hub import snapshot_download  # here, because importing it takes a second that --help need not pay

    with hub_errors(repo_id, revision, repo_type, or_folder=repo_type == "model"):
        folder = snapshot_download(
            repo_id,
            revision=revision,
            repo_type=repo_type,
            allow_patterns=None if allow is None else list(allow),
            ignore_patterns=None if ignore is None else list(ignore),
            tqdm_class=bar_class(quiet),
        )
        return Path(folder)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size in bytes, git's id of it, and its SHA-256 if the Hub knows that."""

    size: int
    blob_id: str
    sha256: str | None


def list_files(repo_id: str, revision: str) -> dict[str, RemoteFile]:
    """Every file of a model's repository; raises as `download` does."""
    from huggingface_hub import HfApi, RepoFile

    with hub_errors(repo_id, revision):
        found = HfApi().list_repo_tree(repo_id, recursive=True, revision=revision)
        files = [entry for entry in found if isinstance(entry, RepoFile)]
        return {f.path: RemoteFile(f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in files}


def read_part(repo_id: str, revision: str, name: str, start: int, end: int) -> bytes:
    """The bytes from `start` to `end` of a file of a model's repository, by a range request; raises as `download` does.

    They are fewer where the file ends before.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with (
        hub_errors(repo_id, revision),
        http_stream_backoff("GET", hf_hub_url(repo_id, name, revision=revision), headers=headers) as response,
    ):
        hf_raise_for_status(response)
        position = start if response.status_code == PARTIAL_CONTENT else 0  # a server may send the whole file instead
        for block in response.iter_bytes():
            data += block[max(0, start - position) :]
            position += len(block)
            if position >= end:
                break
    return bytes(data[: end - start])


def cached(repo_id: str, revision: str, name: str) -> Path | None:
    """A file of a model's repository where the Hub cache has it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch(repo_id: str, revision: str, name: str, folder: Path | None = None, *, quiet: bool = False) -> Path:
    """Fetch one file of a model's repository into the Hub cache, or into `folder`; raises as `download` does."""
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id, revision):
        found = hf_hub_download(repo_id, name, revision=revision, local_dir=folder, tqdm_class=bar_class(quiet))
        return Path(found)


@contextmanager
def hub_bars(quiet: bool = False) -> Iterator[None]:
    """Hide the progress bars of huggingface_hub meanwhile, `quiet` or where nobody watches them.

    For what takes no class of bars.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or draws_bars(quiet):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def hub_errors(
    repo_id: str,
    revision: str | None = None,
    repo_type: str = "model",
    *,
    uploading: bool = False,
    or_folder: bool = False,
) -> Iterator[None]:
    """Inside, what huggingface_hub raises becomes `HubError`, `TemporaryError`, `UsageError` or `OutputError`.

    `or_folder` says that `repo_id` may have been meant as the path of a folder, which is not there.
    """
    from huggingface_hub import errors

    where = repo_id if revision is None else f"{repo_id} at {revision!r}"
    task = "upload" if uploading else "download"
    try:
        yield
    except errors.HFValidationError:
        kind = "no" if uploading else "neither a folder here nor a"
        raise UsageError(f"{repo_id!r} is {kind} Hub id such as 'owner/name'") from None
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        raise HubError(
            f"{where}: access is restricted; accept its terms at {page} and log in with `hf auth login`, "
            "or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{where}: no such revision; expected a branch, tag or commit of that repository") from None
    except errors.RepositoryNotFoundError:
        right = "write" if uploading else "read"
        advice = "as one who may" if uploading else "if it is private, or give the path of a local folder"
        raise HubError(
            f"{where}: no such repository, or no right to {right} it; check the name, log in with `hf auth login` "
            f"{advice}"
        ) from None
    except errors.HfHubHTTPError as error:
        raise _by_status(where, error.response.status_code, uploading) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # the Hub answered, and the cache could not stand in
            raise _by_status(where, error.__cause__.response.status_code, uploading) from None
        if uploading:
            raise UsageError(f"{where}: nothing can be uploaded while HF_HUB_OFFLINE is set; unset it") from None
        lacking = "no such folder here, and as a Hub repository it " if or_folder else ""
        advice = "check the path, or connect and run again" if or_folder else "connect and run again"
        raise TemporaryError(
            f"{where}: {lacking}is not in the local cache, and the Hub cannot be reached (offline mode, or no "
            f"network); {advice}"
        ) from None
    except ValueError as error:
        if not _is_clients(error):
            raise
        raise HubError(
            f"{where}: cannot be {task}ed ({type(error).__name__}); check HF_ENDPOINT, HF_TOKEN and the repository"
        ) from None
    except OSError as error:
        # Not its whole text here and below, which may hold the token.
        reason = error.strerror or type(error).__name__
        if error.errno in CACHE_ERRORS:
            raise OutputError(
                f"{where}: the Hub cache cannot be written ({reason}); see HF_HOME and its disk"
            ) from None
        raise TemporaryError(f"{where}: the {task} failed ({reason}); {UNREACHABLE}") from None
    except Exception as error:
        if not _is_transport(error):
            raise
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # of one file among several
            raise _by_status(where, error.__cause__.response.status_code, uploading) from None
        raise TemporaryError(f"{where}: the {task} failed ({type(error).__name__}); {UNREACHABLE}") from None


def _is_clients(error: Exception) -> bool:
    """Whether it was raised below a function of huggingface_hub, and not by a mistake in our own code around it."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return any(module.partition(".")[0] == "huggingface_hub" for module in modules)


def _is_transport(error: Exception) -> bool:
    """Whether it comes from the libraries below huggingface_hub, which share no base; Xet raises bare RuntimeErrors."""
    return type(error) is RuntimeError or type(error).__module__.startswith(TRANSPORTS)


def _by_status(where: str, status: int, uploading: bool) -> Int4Error:
    refused = 400 <= status < 500 and status not in BUSY
    rights = "the name, and that your token may write there" if uploading else "name and rights"
    kind, advice = (HubError, f"check {rights}") if refused else (TemporaryError, "try again later")
    return kind(f"{where}: the Hub answered with status {status}; {advice}")
