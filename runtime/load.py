"""The model of a checkpoint, built and filled through transformers, whose name mapping serves every architecture."""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.architecture import (
    BUILDING,
    architecture_of,
    cannot_build,
    read_generation_config,
    transformers_bars,
    with_plain_attention,
)
from formats.checkpoint import Checkpoint, StoredTensor
from formats.devices import parse_device, room_for
from formats.errors import CheckpointError, Int4Error
from formats.files import local_folder
from formats.hub import download
from formats.manifest import Manifest, quantization_config
from formats.tensors import TORCH_DTYPES
from runtime.fill import refuse_misfit
from runtime.siblings import join as join_siblings

OTHERWISE = "fill a module of your own with runtime.load_into"


def load(
    folder_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    revision: str | None = None,
    join: bool | None = None,
    activations: str | None = None,
) -> nn.Module:
    """Build the model of an int4 checkpoint through transformers, with `Int4Linear` layers, ready to run.

    `device` defaults to the GPU if there is one; `dtype` to that of the checkpoint, and never touches codes or scales;
    `verify` checks the SHA-256 of every tensor; `join` lets layers that share their input share a product
    (`siblings.join`): by default on a GPU, where it saves launches; a CPU is slower with larger matrices to unpack.
    `activations="fp8"` is faster with many tokens and changes the numbers (`Int4Linear`).

    Raises `CheckpointError` for a checkpoint that is damaged or does not fit its model exactly, `UsageError` without
    transformers, `HubError` and `TemporaryError` from the Hub, `TemporaryError` also where the memory of the GPU does
    not suffice.
    """
    folder, place = resolve(folder_or_hub_id, revision), parse_device(device)
    checkpoint = Checkpoint(folder)
    architecture, config = architecture_of(folder, OTHERWISE)
    # transformers places tensors elsewhere than on the CPU by means of accelerate alone
    by_map = place.type != "cpu" and find_spec("accelerate") is not None
    errors: list[Exception] = []
    room = room_for(f"{folder}, {checkpoint.manifest.sizes.stored_bytes / 1e6:,.0f} MB")
    with room, checkpoint.opened(verify, place if by_map else None) as stored:
        config.quantization_config = {
            **quantization_config(checkpoint.manifest.recipe.scheme),
            "stored": {name: tensor.spec for name, tensor in stored.items()},
            "activations": activations,
            "join": False,  # below, once they have their place
        }
        read = partial(
            architecture.from_pretrained,
            None,
            config=config,
            state_dict={name: _Slice(tensor, errors) for name, tensor in stored.items()},
            dtype=dtype or getattr(config, "dtype", None) or _stored_dtype(checkpoint.manifest),
            device_map={"": place} if by_map else None,
            output_loading_info=True,
        )
        try:
            with BUILDING, transformers_bars():
                model, info = with_plain_attention(read)
            read_generation_config(model, folder)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        except (Int4Error, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a configuration is data from outside: whatever transformers makes of it
            raise next(iter(errors), cannot_build(folder, error, OTHERWISE)) from None
        refuse_misfit(folder, info["missing_keys"], info["unexpected_keys"])
        placed: nn.Module = model if by_map else model.to(place)
        if join is not False:
            join_siblings(placed, gpu_only=join is None)
    return placed


def resolve(
    folder_or_hub_id: str | Path, revision: str | None = None, *, ignore: Sequence[str] = (), quiet: bool = False
) -> Path:
    """The local folder of a checkpoint: itself, or its snapshot from the Hub without files that match `ignore`.

    Raises `UsageError` for a file, and as `download` does.
    """
    model = str(folder_or_hub_id)
    return local_folder(model) or download(model, revision, ignore=ignore, quiet=quiet)


class _Slice:
    """A stored tensor as transformers reads one, by the interface of safetensors' slices; `errors` gets what it raises.

    transformers would hide an error behind one of its own.
    """

    def __init__(self, stored: StoredTensor, errors: list[Exception]) -> None:
        self._stored = stored
        self._errors = errors

    def get_dtype(self) -> str:
        """The name of its type in a safetensors file."""
        return self._stored.spec.dtype

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._stored.spec.shape)

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self._stored.read()[index]
        except (Int4Error, torch.OutOfMemoryError) as error:
            self._errors.append(error)
            raise


def _stored_dtype(manifest: Manifest) -> torch.dtype:
    """The type of the first floating-point tensor of the source."""
    kinds = (TORCH_DTYPES[row.dtype] for row in manifest.tensors)
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)
