"""Texts to evaluate on and to calibrate with, as tokens."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.architecture import first_line, import_transformers
from formats.errors import CheckpointError, UsageError
from formats.hub import download

WIKITEXT_REPO, WIKITEXT_ZIP = "ggml-org/ci", "wikitext-2-raw-v1.zip"
WIKITEXT_TEST, WIKITEXT_TRAIN = "wikitext-2-raw/wiki.test.raw", "wikitext-2-raw/wiki.train.raw"
WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, as it is but for a byte order mark; raises `UsageError` when it is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def wikitext2(quiet: bool = False) -> str:
    """The test split of WikiText-2 raw as the standard protocol joins it; the file's SHA-256 is checked."""
    archive, raw = _wikitext(WIKITEXT_TEST, quiet)
    if hashlib.sha256(raw).hexdigest() != WIKITEXT_SHA256:
        raise CheckpointError(f"{archive}: {WIKITEXT_TEST} is not the official test split; delete it and run again")
    return join_rows(raw.decode("utf-8"))


def _wikitext(name: str, quiet: bool) -> tuple[Path, bytes]:
    """The archive of WikiText-2 raw, and the file `name` of it."""
    archive = download(WIKITEXT_REPO, allow=[WIKITEXT_ZIP], repo_type="dataset", quiet=quiet) / WIKITEXT_ZIP
    with zipfile.ZipFile(archive) as files:
        return archive, files.read(name)


def join_rows(raw: str) -> str:
    """The raw file as the dataset's rows (its lines, blank ones empty) joined by blank lines."""
    lines = io.StringIO(raw, newline="\n")  # str.splitlines would split at more than line feeds
    return "\n\n".join(line if line.strip() else "" for line in lines)


def wikitext2_train(quiet: bool = False) -> str:
    """The training split of WikiText-2 raw, joined like the other."""
    _, raw = _wikitext(WIKITEXT_TRAIN, quiet)
    return join_rows(raw.decode("utf-8"))


DATASETS: dict[str, Callable[[bool], str]] = {"wikitext2": wikitext2}
CALIBRATION_DATASETS: dict[str, Callable[[bool], str]] = {"wikitext2": wikitext2_train}


def calibration_text(name: str, quiet: bool = False) -> str:
    """The text of the file `name`, or else of the dataset of that name; raises `UsageError` where there is neither.

    `quiet` hides the bar of a download.
    """
    if Path(name).is_file():
        return read_text(Path(name))
    if name not in CALIBRATION_DATASETS:
        raise UsageError(f"--calibration {name}: is no file, nor one of {sorted(CALIBRATION_DATASETS)}")
    return CALIBRATION_DATASETS[name](quiet)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, by transformers; raises `CheckpointError`, or `UsageError` without transformers."""
    transformers = import_transformers(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load its tokenizer ({first_line(error)})") from None


def tokenize(folder: Path, text: str) -> Tensor:
    """The whole of `text` as tokens [T] of the tokenizer in `folder`, with no special ones added."""
    tokenizer = load_tokenizer(folder)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def drawn_windows(tokens: Tensor, seq_len: int, count: int, seed: int) -> Tensor:
    """So many of `windows_of` [W, seq_len], drawn by `seed`, in their order; all where there are fewer."""
    windows = windows_of(tokens, seq_len)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]
    return windows[drawn.sort().values]


def windows_of(tokens: Tensor, seq_len: int, max_windows: int | None = None) -> Tensor:
    """Tokens [T] → windows [W, seq_len] that do not overlap; the tail is dropped.

    Raises `UsageError` when the text has not one whole window.
    """
    if seq_len < 2:
        raise UsageError(f"--seq-len {seq_len}: a window needs two tokens, one to predict the other from")
    count = tokens.numel() // seq_len
    if count == 0:
        raise UsageError(f"the text has {tokens.numel()} tokens, too few for a window of {seq_len}; lower --seq-len")
    count = min(count, max_windows or count)
    return tokens[: count * seq_len].view(count, seq_len)
