"""Other people's int4 formats by name: each a relayout of this one, both ways."""

from formats.interop.awq import Awq
from formats.interop.base import Layout
from formats.interop.compressed_tensors import CompressedTensors
from formats.interop.gptq import Gptq
from formats.interop.mlx import Mlx

LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (CompressedTensors, Gptq, Awq, Mlx)}
