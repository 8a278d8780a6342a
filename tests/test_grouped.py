import pytest
import torch
from checkpoints import random
from products import TOLERANCE, distance, exact_grouped_product
from torch import Tensor

from formats import codec
from formats.layout import Scheme
from runtime.ops import grouped_linear, int4_grouped_linear

SCHEMES = [Scheme(-1), Scheme(8), Scheme(24, False), Scheme(64), Scheme(128, False)]
ENDS = [(5, 5, 40, 41), (0, 0, 0, 0), (64, 65, 66, 130), (0, 1, 2, 3)]  # rows of four experts end behind these


def operands(ends: tuple[int, ...], scheme: Scheme, dtype: torch.dtype, device: str, rows: int, columns: int) -> tuple[
    Tensor, Tensor, codec.Quantized
]:  # fmt: skip
    """x, the ends, and a stack of matrices."""
    matrices = [codec.quantize(random(rows, columns, seed=e, dtype=dtype), scheme, dtype) for e in range(len(ends))]
    parts = zip(*(matrix.tensors() for matrix in matrices), strict=True)
    stack = codec.Quantized(*(torch.stack(part).to(device) for part in parts), *[None] * scheme.symmetric)
    x = random(ends[-1], columns, seed=9, dtype=dtype) * 20
    return x.to(device), torch.tensor(ends, device=device), stack


def check(
    ends: tuple[int, ...], scheme: Scheme, dtype: torch.dtype, device: str, product, rows=70, columns=172
) -> None:
    x, where, stack = operands(ends, scheme, dtype, device, rows, columns)
    y = product(x, where, stack)
    assert y.dtype == dtype
    if ends[-1]:
        assert distance(y, exact_grouped_product(x, where, stack, scheme)) <= TOLERANCE[dtype]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_the_kernel_agrees_with_the_codec(ends: tuple[int, ...], scheme: Scheme) -> None:
    kernel = pytest.importorskip("runtime.kernels.grouped", reason="Triton is not on this platform").grouped
    check(ends, scheme, torch.float16, "cpu", lambda x, where, stack: kernel(x, where, stack, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_a_gpu_each_expert_is_multiplied_by_itself(scheme: Scheme) -> None:
    check(ENDS[0], scheme, torch.bfloat16, "cpu", lambda x, where, s: grouped_linear(x, where, *vars(s).values(),
                                                                                     scheme.group_size))  # fmt: skip


def test_gradients_reach_the_rows() -> None:
    scheme = Scheme(64)
    x, ends, stack = operands(ENDS[0], scheme, torch.float16, "cpu", 24, 64)
    x = x.float().requires_grad_()
    y = int4_grouped_linear(x, ends, *vars(stack).values(), scheme.group_size)
    (found,) = torch.autograd.grad(y.sum(), x)
    rows = exact_grouped_product(
        torch.eye(64), torch.tensor([0, 0, 64, 64]), stack, scheme
    )  # of the third expert: [K, N]
    assert torch.allclose(found[5:40], rows.sum(1).float().expand(35, 64), atol=1e-4)


def test_the_operator_is_one_for_the_compiler() -> None:
    scheme = Scheme(64)
    x, ends, stack = operands(ENDS[0], scheme, torch.float16, "cpu", 24, 64)
    torch.library.opcheck(int4_grouped_linear, (x, ends, *vars(stack).values(), scheme.group_size))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("ends", [*ENDS, (300, 1000, 1000, 1500)], ids=str)
def test_the_kernel_agrees_with_the_codec_on_a_gpu(ends: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
    from runtime.kernels.grouped import grouped

    for rows, columns in ((70, 172), (1024, 512)):
        check(ends, scheme, dtype, "cuda", lambda x, where, s: grouped(x, where, s, scheme), rows, columns)
