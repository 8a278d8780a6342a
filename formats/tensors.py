"""Between stored bytes and torch tensors."""

import ctypes
import hashlib

import torch
from torch import Tensor

from formats.container import Container
from formats.layout import TensorSpec

PIECE_BYTES = 16 << 20  # of a tensor, on its way to a GPU

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


def host_buffer(nbytes: int, *, pinned: bool) -> memoryview:
    """Memory on the host, `pinned` where a GPU is to copy from it."""
    return view_of(torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned))


def view_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous `tensor` on the host, to be read and written as bytes."""
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # lives as long as the view
    return memoryview(array).cast("B")


def tensor_from(data: bytearray | memoryview, spec: TensorSpec) -> Tensor:
    """The tensor whose bytes are `data`, which it shares."""
    if spec.numel == 0:
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape)


def read_tensor(
    container: Container, name: str, device: torch.device | None = None, digest: "hashlib._Hash | None" = None
) -> Tensor:
    """A tensor of `container` on `device`, or the CPU, piece by piece; `digest` is fed its bytes."""
    entry = container.tensors[name]
    tensor = torch.empty(entry.spec.shape, dtype=TORCH_DTYPES[entry.spec.dtype], device=device)
    on_host = tensor.device.type == "cpu"
    octets = tensor.flatten().view(torch.uint8)
    place = octets if on_host else torch.empty(min(len(octets), PIECE_BYTES), dtype=torch.uint8, pin_memory=True)
    view = view_of(place)
    for start in range(0, len(octets), PIECE_BYTES):
        end = min(start + PIECE_BYTES, len(octets))
        piece = view[start:end] if on_host else view[: end - start]
        container.read_into(piece, entry.start + start)
        if digest is not None:
            digest.update(piece)
        if not on_host:
            octets[start:end] = place[: end - start]
    return tensor


def bytes_of(tensor: Tensor) -> bytearray:
    """A copy of the bytes of `tensor` on the host, row-major."""
    data = bytearray(tensor.numel() * tensor.element_size())
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
    return data


def spec_of(tensor: Tensor) -> TensorSpec:
    """Type and shape of `tensor`, in the format's names."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    return TensorSpec(names[tensor.dtype], tuple(tensor.shape))
