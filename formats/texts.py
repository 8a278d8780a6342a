"""Texts to evaluate on and to calibrate with, as tokens."""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.architecture import first_line, import_transformers
from formats.errors import CheckpointError, Int4Error, UsageError
from formats.hub import download

WIKITEXT_REPO, WIKITEXT_ZIP = "ggml-org/ci", "wikitext-2-raw-v1.zip"


@dataclass(frozen=True)
class Split:
    """A file of the archive of WikiText-2 raw, and the SHA-256 of the official one where it is known here."""

    member: str
    sha256: str | None


DATASETS = {
    "wikitext2": Split(
        "wikitext-2-raw/wiki.test.raw", "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    )
}
CALIBRATION_DATASETS = {"wikitext2": Split("wikitext-2-raw/wiki.train.raw", None)}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, as it is but for a byte order mark; raises `UsageError` when it is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def wikitext2(split: Split, quiet: bool = False) -> str:
    """A split of WikiText-2 raw as the standard protocol joins it; `quiet` hides the bar of its download.

    Raises `CheckpointError` for an archive that is damaged, by its own sums, or whose file is not the official one, and
    as `download` does.
    """
    try:
        folder = download(WIKITEXT_REPO, allow=[WIKITEXT_ZIP], repo_type="dataset", quiet=quiet)
    except Int4Error as error:
        raise type(error)(f"wikitext2, in the repository {error}") from None
    archive = folder / WIKITEXT_ZIP
    again = f"delete {archive.resolve()} and run again"  # in the Hub cache the name alone is only a link
    try:
        with zipfile.ZipFile(archive) as files:
            raw = files.read(split.member)
        text = raw.decode("utf-8")
    except Exception as error:  # a file from outside: whatever zipfile and its decompressors make of it
        raise CheckpointError(f"{archive}: {split.member} cannot be read ({first_line(error)}); {again}") from None
    if split.sha256 is not None and hashlib.sha256(raw).hexdigest() != split.sha256:
        raise CheckpointError(f"{archive}: {split.member} is not the official file; {again}")
    return join_rows(text)


def join_rows(raw: str) -> str:
    """The raw file as the dataset's rows (its lines, blank ones empty) joined by blank lines."""
    lines = io.StringIO(raw, newline="\n")  # str.splitlines would split at more than line feeds
    return "\n\n".join(line if line.strip() else "" for line in lines)


def calibration_text(name: str, quiet: bool = False) -> str:
    """The text of the file `name`, or else of the dataset of that name; raises `UsageError` where there is neither.

    `quiet` hides the bar of a download.
    """
    if Path(name).is_file():
        return read_text(Path(name))
    if name not in CALIBRATION_DATASETS:
        raise UsageError(f"--calibration {name}: is no file, nor one of {sorted(CALIBRATION_DATASETS)}")
    return wikitext2(CALIBRATION_DATASETS[name], quiet)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, by transformers; raises `CheckpointError`, or `UsageError` without transformers."""
    transformers = import_transformers(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its files are data from outside: whatever transformers and tokenizers make of them
        raise CheckpointError(
            f"{folder}: holds no tokenizer that transformers can load ({first_line(error)}); copy tokenizer.json and "
            "tokenizer_config.json from the original"
        ) from None


def tokenize(folder: Path, text: str) -> Tensor:
    """The whole of `text` as tokens [T] of the tokenizer in `folder`, with no special ones added."""
    tokenizer = load_tokenizer(folder)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


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
    if tokens.numel() == 0:
        raise UsageError("the text is empty; give one with words in it")
    count = tokens.numel() // seq_len
    if count == 0:
        raise UsageError(
            f"the text has {tokens.numel()} tokens, too few for a window of {seq_len}; give a longer text, or lower "
            "--seq-len"
        )
    count = min(count, max_windows or count)
    return tokens[: count * seq_len].view(count, seq_len)
