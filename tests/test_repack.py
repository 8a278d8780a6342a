import pytest
import torch

from formats import codec

repack = pytest.importorskip("runtime.repack", reason="Triton is not on this platform")

SHAPES = [(16, 64), (37, 172), (100, 200), (1, 8)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def quantized(rows: int, columns: int, device: str, *, symmetric: bool = True) -> codec.Quantized:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    zero = torch.randint(-8, 8, (rows, 3), generator=generator, dtype=torch.int8)
    return codec.Quantized(
        codec.pack(codes).to(device),
        torch.rand(rows, 3, generator=generator).bfloat16().to(device),
        None if symmetric else codec.pack_zero_point(zero).to(device),
    )


def naive(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Kernel order by its definition in `fragments`, nibble by nibble."""
    rows = packed.shape[0]
    codes = torch.zeros(-(-rows // 16) * 16, -(-columns // 64) * 64, dtype=torch.int64)
    codes[:rows, :columns] = codec.unpack(packed, columns)
    words = torch.zeros(codes.shape[0] // 16, codes.shape[1] // 64, 128, dtype=torch.int64)
    for g in range(8):
        for c in range(4):
            for t in range(4):
                for j in range(2):
                    for e in range(2):
                        for neighbour in range(2):
                            nibble = codes[g + 8 * e :: 16, 16 * t + 8 * j + 2 * c + neighbour :: 64] + 8
                            words[:, :, 16 * g + 4 * c + t] |= nibble << (4 * (2 * j + e + 4 * neighbour))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_kernel_order_is_that_of_the_drawing(rows: int, columns: int, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter stands in for a GPU")
    matrix = quantized(rows, columns, device)
    arranged = repack.arrange(matrix)
    assert torch.equal(arranged.packed.cpu(), naive(matrix.packed.cpu(), columns))
    assert torch.equal(arranged.scale, matrix.scale.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_zero_points_lie_in_the_mantissa_of_a_power_of_two(dtype: torch.dtype) -> None:
    matrix = quantized(37, 172, "cuda" if torch.cuda.is_available() else "cpu", symmetric=False)
    matrix = codec.Quantized(matrix.packed, matrix.scale.to(dtype), matrix.zero_point)
    zero = repack.arrange(matrix).zero_point
    assert zero is not None
    assert matrix.zero_point is not None
    base = {torch.bfloat16: 128, torch.float16: 1024}[dtype]
    assert torch.equal(zero.view(dtype).float() - base - 8, codec.unpack_zero_point(matrix.zero_point, 37).T.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (2048, 1032)])
def test_restore_inverts_arrange(rows: int, columns: int, symmetric: bool, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter stands in for a GPU")
    matrix = quantized(rows, columns, device, symmetric=symmetric)
    restored = repack.restore(repack.arrange(matrix), columns)
    assert torch.equal(restored.packed, matrix.packed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(restored.tensors(), matrix.tensors(), strict=True))
