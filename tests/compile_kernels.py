"""Compile every kernel for GPUs that need not be there; prints a row each. Not for the interpreter: run on its own.

A row: chip, kernel, stages of the compiler that ran, bytes of local memory (spilled registers; "-" where unknown) and
of shared memory.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from triton import compile as triton_compile
from triton import knobs
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from converter.quantize.kernels import quantize_kernel
from converter.quantize.kernels.sweep import TILE_ROWS, sweep_kernel
from runtime.kernels import hopper, hopper_choice, hopper_fp8, hopper_prefill, launch
from runtime.kernels.dequantize import dequantize_kernel
from runtime.kernels.grouped import grouped_kernel
from runtime.kernels.matmul import matmul_kernel
from runtime.kernels.splitk import reduce_kernel as splitk_reduce_kernel
from runtime.kernels.splitk import splitk_kernel
from runtime.repack import arrange_kernel, restore_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "w_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16", "bias_ptr": "*bf16", "packed_ptr": "*i32",
    "words_ptr": "*i32", "scale_ptr": "*bf16", "zero_ptr": "*i32", "bad_ptr": "*i32", "partial_ptr": "*fp32",
    "ends_ptr": "*i32",
}  # fmt: skip
FP32 = dict.fromkeys(("wanted_ptr", "before_ptr", "pull_ptr", "scale_ptr", "zero_ptr", "lost_ptr"), "*fp32")
ALIGNED = (*POINTERS, "N", "K", "words", "columns")  # multiples of 16 where shapes are, as Triton finds at a launch
TILE = {"SYMMETRIC": True, "ONE_SCALE": True, "QUADS": True, "BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 128}
ABSMAX = {"SEARCH": False, "SMALLEST": 2.0**-126, "WHOLE": True}
PORTABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "absmax": (quantize_kernel, {**ABSMAX, "SYMMETRIC": True, "GROUPS": 8, "LANES": 4, "TURNS": 8, "CHUNKS": 1}),
    "absmax asymmetric, chunks": (
        quantize_kernel, {**ABSMAX, "SYMMETRIC": False, "GROUPS": 1, "LANES": 128, "TURNS": 8, "CHUNKS": 4}),
    "absmax asymmetric, rows of fp32": (
        quantize_kernel, {**ABSMAX, "SYMMETRIC": False, "GROUPS": 1, "LANES": 128, "TURNS": 8, "CHUNKS": 4,
                          "groups": 1}),  # a 1 is a constant for Triton
    "search": (quantize_kernel, {
        **ABSMAX, "SEARCH": True, "SYMMETRIC": False, "GROUPS": 32, "LANES": 4, "TURNS": 8, "CHUNKS": 1}),
    "search, a row of 16384": (quantize_kernel, {
        **ABSMAX, "SEARCH": True, "SYMMETRIC": False, "GROUPS": 1, "LANES": 256, "TURNS": 8, "CHUNKS": 1, "groups": 1}),
    "sweep": (sweep_kernel, {"HAS_BEFORE": True, "ROWS": TILE_ROWS, "COLUMNS": 128}),
    "matmul": (matmul_kernel, {**TILE, "HAS_BIAS": True, "BLOCK_N": 128, "BLOCK_M": 128}),
    "matmul, scales inside": (matmul_kernel, {**TILE, "HAS_BIAS": False, "ONE_SCALE": False, "BLOCK_K": 32}),
    "splitk": (splitk_kernel, TILE),
    "splitk asymmetric": (splitk_kernel, {**TILE, "SYMMETRIC": False}),
    "splitk reduce": (splitk_reduce_kernel, {"HAS_BIAS": True, "BLOCK": 1024}),
    "grouped": (grouped_kernel, {**TILE, "E": 8, "EXPERTS": 8}),
    "grouped, many rows": (grouped_kernel, {**TILE, "SYMMETRIC": False, "BLOCK_M": 64, "E": 100, "EXPERTS": 128}),
    "dequantize": (dequantize_kernel, {"SYMMETRIC": True, "BLOCK_ROWS": 8, "BLOCK_WORDS": 64}),
    "dequantize asymmetric": (dequantize_kernel, {"SYMMETRIC": False, "BLOCK_ROWS": 8, "BLOCK_WORDS": 64}),
    "arrange": (arrange_kernel, {"TILE": 1024}),
    "restore": (restore_kernel, {"TILE": 1024}),
}  # fmt: skip


def aligned(names: list[str]) -> dict[tuple[int], list[list[Any]]]:
    """The attributes of the arguments that are multiples of 16."""
    return {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names}


def portable() -> Iterator[tuple[str, str, Any]]:
    """Chip, name and compiled kernel of everything in plain Triton."""
    for name, (kernel, constants) in PORTABLE.items():
        signature = {argument: POINTERS.get(argument, "i32") for argument in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        if name.endswith("fp32"):
            signature["w_ptr"] = "*fp32"
        if kernel is sweep_kernel:
            signature |= FP32
        options = {"num_warps": 8 if constants.get("BLOCK_M") == 128 or constants.get("LANES") == 256 else 4}
        for chip, target in TARGETS.items():
            source = ASTSource(kernel, signature, constants, aligned(kernel.arg_names))
            yield chip, name, triton_compile(source, target=target, options=options)


def shipped() -> Iterator[tuple[str, str, Any]]:
    """The Hopper kernels with every set of options in the table, symmetric and with a bias, as they are launched.

    Those that fill the shared memory once more, with narrow groups and zero points.
    """
    hopper_prefill.processors = hopper_fp8.processors = lambda device: hopper_choice.PROCESSORS
    launch.Launcher.__call__ = lambda self, grid, x, args, constants, **options: launches.append(
        (self.kernel, args, constants, options)
    )
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = []
    sources = {
        json.dumps([entry.choice.kernel, entry.choice.options]): entry for entry in hopper_choice.table().entries
    }
    narrow = [(entry, 16) for entry in sources.values() if entry.choice.kernel == "prefill"]  # they fill what there is
    for entry, group in [*((entry, 128) for entry in sources.values()), *narrow]:
        size, choice = entry.size, entry.choice
        x = torch.empty(size.tokens, size.columns, dtype=torch.bfloat16)
        words = torch.empty(size.rows // 16, size.columns // 64, 128, dtype=torch.int32)
        scale = torch.empty(size.columns // group, size.rows, dtype=torch.bfloat16)
        zero = torch.empty(scale.shape, dtype=torch.int16) if group < 128 else None
        hopper.KERNELS[choice.kernel](x, words, scale, zero, scale[0], group, **choice.options)
        while launches:
            kernel, args, constants, options = launches.pop()
            name = f"{kernel.__name__.removesuffix('_kernel')} {choice.options}"
            yield "sm_90", name if zero is None else f"{name}, narrow", compile_launch(kernel, args, constants, options)


def compile_launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]) -> Any:
    """The kernel of one launch, for Hopper."""
    names = kernel.arg_names
    types = [type_of(arg) for arg in args] + ["constexpr"] * len(constants)
    whole = [isinstance(arg, torch.Tensor) and name != "bias_ptr" for name, arg in zip(names, args, strict=False)]
    attributes = {(i,): [["tt.divisibility", 16]] for i, aligned in enumerate(whole) if aligned}
    values = {(len(args) + i,): value for i, value in enumerate(constants.values())}
    source_type = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_type(kernel, dict(zip(names, types, strict=True)), values, attributes)
    warps = {"num_warps": constants.get("num_warps", 4)}
    return triton_compile(source, target=TARGETS["sm_90"], options={**warps, **options, "launch_pdl": True})


def type_of(arg: Any) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(arg, launch.Box):
        kind = canonicalize_dtype(arg.base.dtype)
        return f"tensordesc<{kind}[{', '.join(map(str, arg.block_shape))}],{arg.layout!r}>"
    return f"*{canonicalize_dtype(arg.dtype)}" if isinstance(arg, torch.Tensor) else "i32"


def local_bytes(compiled: Any) -> str:
    """Bytes of local memory that the machine code takes, by cuobjdump."""
    if "cubin" not in compiled.asm:
        return "-"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return str(sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))))


if __name__ == "__main__":
    for compiled_set in (portable(), shipped()):
        for chip, name, compiled in compiled_set:
            stages = ",".join(sorted(compiled.asm))
            print(chip, name, stages, local_bytes(compiled), compiled.metadata.shared, sep="\t", flush=True)
