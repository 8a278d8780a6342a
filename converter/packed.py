"""Sources in another int4 format: compressed-tensors, GPTQ, AWQ and MLX, taken over as they are."""

from dataclasses import dataclass
from typing import Any

from formats.errors import CheckpointError, some
from formats.interop import LAYOUTS
from formats.interop.base import Layout
from formats.layout import SCALE_DTYPES, TensorSpec
from formats.manifest import QUANT_METHOD
from formats.selection import FLOAT_DTYPES, WEIGHT, never_quantized

WORD_DTYPES = ("I32", "U32")
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # in a configuration
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")  # where older tools keep the same
ADVICE = "convert the model that it was made from"


@dataclass(frozen=True)
class PackedMatrix:
    """How an int4 matrix is stored: the file and the type of each of its `parts`, behind the name of its module."""

    layout: Layout
    module: str
    meant: TensorSpec  # the matrix, in the type that its scales will have
    parts: dict[str, tuple[str, TensorSpec]]

    @property
    def words(self) -> str:
        """The stored tensor that holds the codes."""
        return self.stored(self.layout.words)

    @property
    def reason(self) -> str:
        """Why it is quantised."""
        return f"int4 already ({self.layout.name})"

    def stored(self, part: str) -> str:
        """The name of a part in its file."""
        return f"{self.module}.{part}"


def int4_layout(config: dict[str, Any], where: str) -> Layout | None:
    """The int4 format of a model by its configuration, or None where that names no quantisation.

    Raises `CheckpointError` for any other quantisation.
    """
    if (found := _quantization(config)) is None:
        return None
    method, settings = found
    try:
        if method in LAYOUTS and isinstance(settings, dict):
            return LAYOUTS[method].from_settings(settings)
    except CheckpointError as error:
        method = f"{method}: {error}"
    if method == QUANT_METHOD:
        raise CheckpointError(f"{where}: the model is what int4-convert writes; give the one that it was made from")
    raise CheckpointError(
        f"{where}: the model is already quantised ({method}); expected 16- or 32-bit weights, FP8 with a "
        f"weight_block_size, or int4 of {some([*LAYOUTS])}: convert the model that it was made from"
    )


def _quantization(config: dict[str, Any]) -> tuple[str, Any] | None:
    """What the configuration calls the method by which the model was quantised, and its settings, if it was."""
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        return "mlx", mlx
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    return str(found.get("quant_method", "method unknown") if isinstance(found, dict) else found), found


def packed_matrices(
    shards: dict[str, dict[str, TensorSpec]], layout: Layout, dtype: str, where: str
) -> dict[str, PackedMatrix]:
    """The int4 matrices of `shards` by the names of the weights that they stand for.

    `dtype` is that of the model, which fp32 scales get. Raises `CheckpointError` for parts that do not fit together.
    """
    place = {name: shard for shard, tensors in shards.items() for name in tensors}
    found = {}
    for tensors in shards.values():
        for name, spec in tensors.items():
            module = name.removesuffix(f".{layout.words}")
            if module == name or spec.dtype not in WORD_DTYPES or len(spec.shape) != 2:
                continue
            shape, where_it_is = layout.shape(spec), f"{where}: {name!r}"
            names = {part: f"{module}.{part}" for part in layout.specs(*shape, dtype)}
            parts = {part: (place[full], shards[place[full]][full]) for part, full in names.items() if full in place}
            scale_dtype = _check(layout, shape, {part: spec for part, (_, spec) in parts.items()}, dtype, where_it_is)
            meant = TensorSpec(scale_dtype if scale_dtype in SCALE_DTYPES else dtype, shape)
            if reason := never_quantized(module + WEIGHT, meant):
                raise CheckpointError(f"{where_it_is}: is in int4, but is kept here ({reason}); {ADVICE}")
            found[module + WEIGHT] = PackedMatrix(layout, module, meant, parts)
    return found


def _check(layout: Layout, shape: tuple[int, int], found: dict[str, TensorSpec], default: str, where: str) -> str:
    """The type of the scales; raises `CheckpointError` unless each part is as the layout has it."""
    types = {spec.dtype for spec in found.values()} & set(FLOAT_DTYPES)
    scale_dtype = types.pop() if len(types) == 1 else default
    for part, spec in layout.specs(*shape, scale_dtype).items():
        is_missing = part not in found and part in layout.optional
        if found.get(part) != spec and not is_missing:
            raise CheckpointError(
                f"{where}: its {part} is {found.get(part, 'missing')}, expected {spec} ({layout.name} in 4 bits, "
                f"groups of {layout.scheme.group_size}); {ADVICE}"
            )
    return scale_dtype
