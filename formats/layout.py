"""What a quantised matrix looks like on disk: names, shapes and bytes, in integers only (see SPEC.md)."""

from dataclasses import dataclass
from math import prod

from formats.errors import UsageError

BITS = 4
CODE_MIN, CODE_MAX = -8, 7
CODES_PER_WORD = 32 // BITS
ROW_WISE = -1
MAX_SIZE = 2**63 - 1  # of a dimension and of a tensor in bytes; no file holds more, and no message has to print it
MAX_RANK = 64

PACKED, SCALE, ZERO_POINT = "_packed", "_scale", "_zero_point"
SCALE_DTYPES = ("BF16", "F16")

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of one stored tensor; `dtype` is a safetensors name such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def turned(self) -> "TensorSpec":
        """The same with its last two dimensions exchanged."""
        return TensorSpec(self.dtype, (*self.shape[:-2], self.shape[-1], self.shape[-2]))

    @property
    def is_possible(self) -> bool:
        """Whether a file could hold it: a known type, and a size that 64 bits count."""
        return (
            self.dtype in DTYPE_BYTES
            and len(self.shape) <= MAX_RANK
            and all(0 <= size <= MAX_SIZE for size in self.shape)
            and self.nbytes <= MAX_SIZE
        )

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Scheme:
    """How codes share scales: `group_size` columns a group (or `ROW_WISE`), with zero points unless `symmetric`.

    Raises `UsageError` for a group size that is neither -1 nor a positive multiple of 8.
    """

    group_size: int = 256
    symmetric: bool = True

    def __post_init__(self) -> None:
        size = self.group_size
        if size != ROW_WISE and (not 0 < size <= MAX_SIZE or size % CODES_PER_WORD):
            raise UsageError(
                f"group size {size}: expected a positive multiple of {CODES_PER_WORD}, or {ROW_WISE} for whole rows"
            )

    def group_width(self, columns: int) -> int:
        """Columns of a full group in a row of `columns`; a row narrower than a group is one short group."""
        return columns if self.group_size == ROW_WISE else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Groups in a row of `columns`, the short last one included."""
        return ceil_div(columns, self.group_width(columns))

    def stored(self, name: str, shape: tuple[int, ...], scale_dtype: str) -> dict[str, TensorSpec]:
        """The tensors that stand for `name`, a matrix [N, K] or a stack [E, N, K], in the order of their bytes."""
        *stack, rows, columns = shape
        groups = self.groups(columns)
        tensors = {
            name + PACKED: TensorSpec("I32", (*stack, rows, ceil_div(columns, CODES_PER_WORD))),
            name + SCALE: TensorSpec(scale_dtype, (*stack, rows, groups)),
        }
        if not self.symmetric:
            tensors[name + ZERO_POINT] = TensorSpec("I32", (*stack, ceil_div(rows, CODES_PER_WORD), groups))
        return tensors


def scale_dtype_for(dtype: str) -> str:
    """The type of the scales of a source matrix of type `dtype`: its own where that is 16 bits wide, else bf16."""
    return dtype if dtype in SCALE_DTYPES else "BF16"


def stored_tensors(name: str, spec: TensorSpec, scheme: Scheme | None) -> dict[str, TensorSpec]:
    """The tensors on disk that stand for the tensor `name`: by `scheme`, or itself if that is None.

    `spec` of what is quantised has rows of output features: [N, K], or [E, N, K] of a stack.
    """
    return {name: spec} if scheme is None else scheme.stored(name, spec.shape, scale_dtype_for(spec.dtype))
