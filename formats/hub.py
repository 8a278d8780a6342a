"""Folders from the Hugging Face Hub, by huggingface_hub, with its errors in this project's terms."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.asyncio import tqdm_asyncio

from formats.errors import HubError, Int4Error, TemporaryError, UsageError

SHARED_BLOBS = "blobs"  # beside the repositories of a cache, for files that came through Xet
BUSY = (408, 425, 429)


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

    `allow` and `ignore` are glob patterns of file names. Raises `HubError`, `TemporaryError` or `UsageError`.
    """
    from huggingface_hub import snapshot_download  # here, because importing it takes a second that --help need not pay

    with _translated(repo_id, revision, repo_type):
        folder = snapshot_download(
            repo_id,
            revision=revision,
            repo_type=repo_type,
            allow_patterns=None if allow is None else list(allow),
            ignore_patterns=None if ignore is None else list(ignore),
            tqdm_class=_NoBar if quiet or not sys.stderr.isatty() else None,
        )
        return Path(folder)


def link_roots(folder: Path) -> tuple[Path, ...]:
    """The folders that links in `folder` may lead to: of a Hub snapshot, the blobs of its repository and cache."""
    is_snapshot = folder.parent.name == "snapshots" and "--" in folder.parent.parent.name
    if not is_snapshot:
        return (folder,)
    repository = folder.parent.parent.resolve()
    shared = repository.parent / SHARED_BLOBS
    return (repository,) if shared.is_symlink() else (repository, shared)


class _NoBar(tqdm_asyncio):  # type: ignore[type-arg]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@contextmanager
def _translated(repo_id: str, revision: str | None, repo_type: str) -> Iterator[None]:
    from huggingface_hub import errors

    where = repo_id if revision is None else f"{repo_id} at {revision!r}"
    try:
        yield
    except errors.HFValidationError:
        raise UsageError(f"{repo_id!r} is neither a folder here nor a Hub id such as 'owner/name'") from None
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        raise HubError(
            f"{where}: access is restricted; accept its terms at {page} and log in with `hf auth login`, "
            "or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{where}: no such revision; expected a branch, tag or commit of that repository") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{where}: no such repository, or no right to read it; check the name, log in with `hf auth login` if it "
            "is private, or give the path of a local folder"
        ) from None
    except errors.HfHubHTTPError as error:
        raise _by_status(where, error.response.status_code) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # the Hub answered, and the cache could not stand in
            raise _by_status(where, error.__cause__.response.status_code) from None
        raise TemporaryError(
            f"{where}: is not in the local cache and the Hub cannot be reached (offline mode, or no network); "
            "connect and run again"
        ) from None
    except ValueError as error:
        raise HubError(
            f"{where}: cannot be downloaded ({type(error).__name__}); check HF_ENDPOINT, HF_TOKEN and the repository"
        ) from None
    except Exception as error:  # huggingface_hub lets those of httpx, httpx2 and hf_xet through, which share no base
        # The type alone: the text of such an error may hold the token.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise TemporaryError(f"{where}: the download failed ({reason}); run again") from None


def _by_status(where: str, status: int) -> Int4Error:
    refused = 400 <= status < 500 and status not in BUSY
    kind, advice = (HubError, "check name and rights") if refused else (TemporaryError, "try again later")
    return kind(f"{where}: the Hub answered with status {status}; {advice}")
