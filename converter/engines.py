"""Inference engines as data: their kernels for int4 matrices, in the order in which they try them, and what each takes.

Read in the engines' code, not measured on them: vLLM 0.33 (`model_executor/kernels/linear/__init__.py` has the order,
`mixed_precision/*.py` what each takes, `utils/machete_utils.py` and `marlin_utils.py` the sizes; Marlin pads its tiles
since pull request 45295, so it takes any), SGLang 0.5.23 (`compressed_tensors_wNa16.py` and `_moe.py`), transformers
5.23 (`distributed/tensor_parallel.py`). All of these kernels multiply by the scale, of whichever sign. CutlassW4A8 is
left out: it rounds what enters a layer to fp8.
"""

from dataclasses import dataclass

from formats.layout import ROW_WISE


@dataclass(frozen=True)
class Kernel:
    """What a kernel takes: groups of `groups` columns (any where that is None), rows N and columns K by `tiles`."""

    name: str
    groups: tuple[int, ...] | None
    tiles: tuple[tuple[int, int], ...] = ((1, 1),)  # N and K are multiples of one of these pairs
    dtypes: tuple[str, ...] = ("BF16", "F16", "F32")  # of the model; engines compute fp32 models in 16 bits
    zero_points: bool = True
    needs: str = ""  # what not every machine has
    slow: bool = False

    def __str__(self) -> str:
        return " ".join([self.name, *(["(slow)"] if self.slow else []), *([self.needs] if self.needs else [])])

    def refusal(self, matrix: "Matrix") -> str | None:
        """Why it does not run `matrix`, or None where it does."""
        if self.groups is not None and matrix.group not in self.groups:
            sizes = ", ".join(str(size) for size in self.groups if size != ROW_WISE)
            return f"{self.name} takes groups of {sizes}{' or whole rows' if ROW_WISE in self.groups else ''}"
        if not self.zero_points and not matrix.symmetric:
            return f"{self.name} takes no zero points"
        if matrix.dtype not in self.dtypes:
            return f"{self.name} takes {' and '.join(self.dtypes)} models"
        if not any(matrix.rows % rows == 0 and matrix.columns % columns == 0 for rows, columns in self.tiles):
            rows, columns = self.tiles[0]
            return f"{self.name} takes multiples of {rows} rows and {columns} columns"
        return None


@dataclass(frozen=True)
class Matrix:
    """A matrix as a kernel sees it: of fused ones together, and of one GPU."""

    rows: int
    columns: int
    group: int
    symmetric: bool
    dtype: str


@dataclass(frozen=True)
class Engine:
    """An engine with its kernels, in the order in which it tries them."""

    name: str
    linear: tuple[Kernel, ...]
    experts: tuple[Kernel, ...]
    layout: str | None = None  # that `int4-export` writes for it; None: it takes the folder as it is
    fuses: bool = True  # it joins siblings, which must be of one kind
    splits_whole_rows: bool = True  # every GPU gets the scale of the whole row


MARLIN = (ROW_WISE, 32, 64, 128)
OWN = Kernel("Int4Linear", None)
ENGINES = {
    "vllm": Engine(
        "vLLM 0.33",
        (
            Kernel("Machete", (ROW_WISE, 64, 128), ((128, 64),), needs="on Hopper"),
            Kernel("Marlin", MARLIN),
            Kernel("Conch", (ROW_WISE, 128), needs="with conch-triton-kernels"),
            Kernel("Exllama", None, ((8, 1),), dtypes=("F16",), zero_points=False, slow=True),
            Kernel("Triton W4A16", (ROW_WISE, 32, 64, 128, 256), ((8, 1),), slow=True),
            Kernel("Humming", None, needs="where Humming is installed"),
        ),
        (Kernel("Marlin for experts", MARLIN, zero_points=False),),
        layout="compressed-tensors",
    ),
    "sglang": Engine(
        "SGLang 0.5.23",
        (Kernel("Marlin", MARLIN, ((64, 128), (128, 64))),),
        (Kernel("Marlin for experts", MARLIN, ((64, 128), (128, 64)), zero_points=False),),
        layout="compressed-tensors",
    ),
    "transformers": Engine("transformers 5.23", (OWN,), (OWN,), fuses=False, splits_whole_rows=False),
}
