"""What calibration has quantised, on disk layer by layer: an interrupted run goes on behind the last whole layer."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converter.folder import HIDDEN
from formats.codec import Quantized
from formats.container import SUFFIX, Container, Header, Writer
from formats.errors import CheckpointError
from formats.files import clear_folder, make_folder, publish
from formats.layout import PACKED, SCALE, ZERO_POINT
from formats.tensors import bytes_of, read_tensor, spec_of

FOLDER_NAME = f"{HIDDEN}-layers"
OURS = re.compile(rf"layer-\d{{5}}{re.escape(SUFFIX)}")


@dataclass(frozen=True)
class Prepared:
    """A matrix that calibration has quantised, or a stack; `output_error` is that of `ErrorRecord`."""

    quantized: Quantized
    output_error: float

    def matrix(self, number: int | None) -> Quantized:
        """The matrix, or the one of that `number` in a stack."""
        return self.quantized if number is None else self.quantized.matrix(number)


@dataclass(frozen=True)
class Rounded:
    """A matrix on its way to be `Prepared`: what it `lost` and its `size`, squared outputs summed over all tokens."""

    quantized: Quantized
    lost: float
    size: float


def assembled(matrices: Mapping[int | None, Rounded]) -> Prepared:
    """A matrix that has no number, or the stack of those that have one."""
    found = [matrices[number] for number in sorted(matrices, key=lambda number: number or 0)]
    lost, size = sum(one.lost for one in found), sum(one.size for one in found)
    quantized = found[0].quantized if None in matrices else Quantized.stacked([one.quantized for one in found])
    return Prepared(quantized, lost / size if size else 0.0)


class PreparedLayers:
    """A file a layer, in a hidden folder of `out_dir`; those made with another `key` count as missing."""

    def __init__(self, out_dir: Path, key: str) -> None:
        self.folder = out_dir / FOLDER_NAME
        self.key = key
        self._file_of: dict[str, Path] = {}
        self._headers: dict[Path, Header] = {}  # of those files

    def read_layer(self, index: int) -> dict[str, Prepared] | None:
        """The matrices of a layer by their names, or None if it is still to be made."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with Container(path) as container:
                if container.metadata.get("key") != self.key:
                    return None
                found = {name: _read(container, name, error) for name, error in _errors(container).items()}
        except CheckpointError:  # cut short: made again
            return None
        self._file_of |= dict.fromkeys(found, path)
        return found

    def write_layer(self, index: int, matrices: Mapping[str, Prepared]) -> None:
        """Keep the matrices of a layer."""
        make_folder(self.folder)
        path = self._path(index)
        tensors = {
            name + suffix: tensor
            for name, matrix in matrices.items()
            for suffix, tensor in zip((PACKED, SCALE, ZERO_POINT), matrix.quantized.tensors(), strict=False)
        }
        errors = json.dumps({name: matrix.output_error for name, matrix in matrices.items()})
        specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
        with publish(path) as file, Writer(file, specs, {"key": self.key, "errors": errors}) as writer:
            for name, tensor in tensors.items():
                writer.put(name, bytes_of(tensor))
            writer.finish()
        self._file_of |= dict.fromkeys(matrices, path)

    def find(self, name: str) -> Prepared | None:
        """The matrix `name`, or None where calibration had none of that name."""
        if name not in self._file_of:
            return None
        path = self._file_of[name]
        with Container(path, known=self._headers.get(path)) as container:
            self._headers[path] = container.header
            return _read(container, name, _errors(container)[name])

    def clear(self) -> None:
        """Remove the files of layers, whole or half-made, and the folder if nothing else is in it."""
        clear_folder(self.folder, OURS)

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}{SUFFIX}"


def _errors(container: Container) -> dict[str, float]:
    found: dict[str, float] = json.loads(container.metadata["errors"])
    return found


def _read(container: Container, name: str, output_error: float) -> Prepared:
    packed, scale, zero_point = (
        read_tensor(container, stored) if stored in container.tensors else None
        for stored in (name + PACKED, name + SCALE, name + ZERO_POINT)
    )
    if packed is None or scale is None:
        raise CheckpointError(f"{container.path}: lacks {name!r}")
    return Prepared(Quantized(packed, scale, zero_point), output_error)
