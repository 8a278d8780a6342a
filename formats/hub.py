"""Folders from the Hugging Face Hub, by huggingface_hub, with its errors in this project's terms."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from formats.errors import HubError, TemporaryError, UsageError

REFUSED = (401, 403, 404)


def download(
    repo_id: str,
    revision: str | None = None,
    *,
    allow: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    repo_type: str = "model",
) -> Path:
    """Fetch a repository's files into the Hub cache and return the snapshot folder, whose name is the commit.

    `allow` and `ignore` are glob patterns of file names. Raises `HubError`, `TemporaryError` or `UsageError`.
    """
    from huggingface_hub import snapshot_download  # here, because importing it takes a second that --help need not pay

    with _translated(repo_id, revision):
        folder = snapshot_download(
            repo_id,
            revision=revision,
            repo_type=repo_type,
            allow_patterns=None if allow is None else list(allow),
            ignore_patterns=None if ignore is None else list(ignore),
        )
        return Path(folder)


def cache_root(folder: Path) -> Path:
    """The folder that the links in `folder` may lead to: a Hub snapshot links to its repository's blobs."""
    is_snapshot = folder.parent.name == "snapshots" and "--" in folder.parent.parent.name
    return folder.parent.parent if is_snapshot else folder


@contextmanager
def _translated(repo_id: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    where = repo_id if revision is None else f"{repo_id} at {revision}"
    try:
        yield
    except errors.HFValidationError:
        raise UsageError(f"{repo_id!r} is neither a folder here nor a Hub id such as 'owner/name'") from None
    except errors.GatedRepoError:
        raise HubError(
            f"{where}: access is restricted; accept its terms at https://huggingface.co/{repo_id} and log in "
            "with `hf auth login` (or set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{where}: no such revision; expected a branch, tag or commit of that repository") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{where}: no such repository, or no right to read it; check the name, log in with `hf auth login` if it "
            "is private, or give the path of a local folder"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        kind, advice = (HubError, "check name and rights") if status in REFUSED else (TemporaryError, "try again later")
        raise kind(f"{where}: the Hub answered with status {status}; {advice}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise TemporaryError(
            f"{where}: is not in the local cache and the Hub cannot be reached (offline mode, or no network); "
            "connect and run again"
        ) from None
    except OSError as error:
        raise TemporaryError(f"{where}: the download failed ({type(error).__name__}); run again") from None
