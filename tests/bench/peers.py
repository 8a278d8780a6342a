"""Other people's int4 products of the same weights: each is checked as ours is, or has no time."""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from products import relative_error
from timing import copies_for, graph_time
from torch import Tensor

from formats import codec
from formats.codec import Quantized
from formats.layout import CODE_MIN, Scheme

MAX_ERROR = 3e-2  # some add up in 16 bits
Product = Callable[[Tensor], Tensor]


def tinygemm(quantized: Quantized, columns: int, scheme: Scheme) -> Product:
    """torch's own kernel: two codes from 0 up a byte, the first in the high half, and scale and zero by group."""
    codes = (codec.unpack(quantized.packed, columns) - CODE_MIN).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale = quantized.scale.T
    scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1)  # [G, N, 2]; its zero is that of code 8
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, scheme.group_size, scale_and_zero)


def gemlite(quantized: Quantized, columns: int, scheme: Scheme) -> Product:
    """GemLite, in Triton, with codes from 0 up and 8 as zero point."""
    from gemlite.helper import A16Wn

    codes = (codec.unpack(quantized.packed, columns) - CODE_MIN).to(torch.uint8)
    scale = quantized.scale
    layer: Product = A16Wn(device=scale.device, dtype=scale.dtype).from_weights(
        codes, scale, torch.full_like(scale, -CODE_MIN), W_nbits=4, group_size=scheme.group_size
    )
    return layer


PEERS: dict[str, Callable[[Quantized, int, Scheme], Product]] = {"tinygemm": tinygemm, "GemLite": gemlite}


def measure(m: int, n: int, k: int, scheme: Scheme, device: str = "cuda") -> dict[str, float]:
    """Microseconds by name, of those that are here, take this size and are right."""
    weight = (torch.randn(n, k, device=device) * 0.05).bfloat16()
    quantized = codec.quantize(weight, scheme, torch.bfloat16)
    x = torch.randn(m, k, device=device).bfloat16()
    return dict(_times(x, quantized, scheme))


def _times(x: Tensor, quantized: Quantized, scheme: Scheme) -> Iterator[tuple[str, float]]:
    for name, prepare in PEERS.items():
        try:
            products = [prepare(quantized, x.shape[1], scheme) for _ in range(copies_for(quantized.packed.nbytes))]
            if relative_error(products[0](x), x, quantized, None, scheme) <= MAX_ERROR:
                yield name, round(graph_time([partial(product, x) for product in products]), 2)
        except ImportError:
            continue
        except Exception as error:  # another version, a size that it does not take: whatever it makes of it
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
