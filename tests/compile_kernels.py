"""Compile every kernel for GPUs that need not be there; prints a row each. Not for the interpreter: run on its own."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from converter.quantize.kernels import absmax_kernel
from runtime.kernels.matmul import matmul_kernel
from runtime.kernels.splitk import reduce_kernel, splitk_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "w_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16", "bias_ptr": "*bf16", "packed_ptr": "*i32",
    "scale_ptr": "*bf16", "zero_ptr": "*i32", "bad_ptr": "*i32", "partial_ptr": "*fp32",
}  # fmt: skip
TILE = {"SYMMETRIC": True, "ONE_SCALE": True, "BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 128}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "absmax": (absmax_kernel, {"SMALLEST": 2.0**-126, "SYMMETRIC": True, "ROWS": 16, "WORDS": 32, "CHUNKS": 1}),
    "absmax asymmetric, chunks": (
        absmax_kernel, {"SMALLEST": 2.0**-126, "SYMMETRIC": False, "ROWS": 1, "WORDS": 1024, "CHUNKS": 4}),
    "matmul": (matmul_kernel, {**TILE, "HAS_BIAS": True, "BLOCK_N": 128, "BLOCK_M": 128}),
    "matmul, scales inside": (matmul_kernel, {**TILE, "HAS_BIAS": False, "ONE_SCALE": False, "BLOCK_K": 32}),
    "splitk": (splitk_kernel, TILE),
    "splitk asymmetric": (splitk_kernel, {**TILE, "SYMMETRIC": False}),
    "reduce": (reduce_kernel, {"HAS_BIAS": True, "BLOCK": 1024}),
}  # fmt: skip


def compile_for(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    """The compiled kernel."""
    signature = {name: POINTERS.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    return triton.compile(ASTSource(kernel, signature, constants), target=target)


if __name__ == "__main__":
    for name, (kernel, constants) in KERNELS.items():
        for chip, target in TARGETS.items():
            compiled = compile_for(kernel, constants, target)
            print(f"{chip}\t{name}\t{','.join(sorted(compiled.asm))}")
