"""What a product costs at least, by the bytes that it moves and the operations that it does, on an H200."""

from formats.layout import Scheme

BANDWIDTH = 4.25e12  # bytes a second, read plus written, of an elementwise copy: quantize.py measures it
RATE = 790e12  # operations a second of torch.matmul in bf16 at its best: matmul.py, 28672×8192 with 2048 tokens


def operations(m: int, n: int, k: int) -> int:
    """Multiplications and additions of x [M, K] · W [N, K]ᵀ."""
    return 2 * m * n * k


def bf16_bytes(m: int, n: int, k: int) -> int:
    """Bytes of W, x and y in bf16."""
    return 2 * (n * k + m * (n + k))


def int4_bytes(m: int, n: int, k: int, group: int) -> int:
    """Bytes of a symmetric int4 W with bf16 scales, and of x and y in bf16."""
    stored = Scheme(group).stored("", (n, k), "BF16").values()
    return sum(spec.nbytes for spec in stored) + 2 * m * (n + k)


def least_us(nbytes: int, operations: int) -> float:
    """Microseconds that no kernel on bf16 tensor cores undercuts with a cold cache."""
    return 1e6 * max(nbytes / BANDWIDTH, operations / RATE)
