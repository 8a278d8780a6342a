"""The files of a source that are carried over as they are, beside its weights."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

from formats.container import SUFFIX
from formats.errors import CheckpointError
from formats.files import MAX_NEW_BYTES, open_regular, safe_name

# Other forms of the same weights; they are neither read nor copied.
OTHER_SUFFIXES = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data",
    ".ot", ".npz", ".tflite", ".mlmodel", ".nemo",
)  # fmt: skip
WEIGHT_SUFFIXES = (SUFFIX, *OTHER_SUFFIXES)


def side_files(folder: Path, roots: tuple[Path, ...], shards: Collection[str]) -> Iterator[str]:
    """Every file that is copied: all below `folder` but hidden ones and weights, those of the model in `shards`.

    They are checked here, before any work.

    Raises `CheckpointError` for a link to a folder or out of `roots`, and for what cannot be listed or is no file.
    """
    for parent, folders, files in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (link := Path(parent) / name).is_symlink():
                raise CheckpointError(f"{link}: is a link to a folder; put the folder in its place, or remove it")
        for name in sorted(files):
            relative = (Path(parent) / name).relative_to(folder).as_posix()
            if not name.startswith(".") and not is_weights(relative) and relative not in shards:
                os.close(open_regular(folder / safe_name(relative, str(folder)), roots))
                if len(name.encode()) > MAX_NEW_BYTES:
                    raise CheckpointError(f"{folder / relative}: its name is over {MAX_NEW_BYTES} bytes; shorten it")
                yield relative


def is_weights(name: str) -> bool:
    """Whether the file `name` is left out: weights; but safetensors of a subfolder are another part of the model."""
    suffixes = OTHER_SUFFIXES if "/" in name else WEIGHT_SUFFIXES
    return name.removesuffix(".index.json").endswith(suffixes)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise CheckpointError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or remove it")
