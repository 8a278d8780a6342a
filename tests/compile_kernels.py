"""Compile every kernel for GPUs that need not be there; prints a row each. Not for the interpreter: run on its own.

A row: chip, kernel, stages of the compiler that ran, bytes of local memory (spilled registers; "-" where unknown).
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from converter.quantize.kernels import absmax_kernel
from runtime.kernels import hopper
from runtime.kernels.hopper_batch import batch_kernel
from runtime.kernels.hopper_decode import decode_kernel
from runtime.kernels.hopper_prefill import prefill_kernel
from runtime.kernels.hopper_tiles import REDUCE_ROWS, REDUCE_TOKENS, reduce_kernel
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
}  # fmt: skip
ALIGNED = (*POINTERS, "N", "K", "words", "columns")  # multiples of 16 where shapes are, as Triton finds at a launch
TILE = {"SYMMETRIC": True, "ONE_SCALE": True, "BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 128}
PORTABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "absmax": (absmax_kernel, {"SMALLEST": 2.0**-126, "SYMMETRIC": True, "ROWS": 16, "WORDS": 32, "CHUNKS": 1}),
    "absmax asymmetric, chunks": (
        absmax_kernel, {"SMALLEST": 2.0**-126, "SYMMETRIC": False, "ROWS": 1, "WORDS": 1024, "CHUNKS": 4}),
    "matmul": (matmul_kernel, {**TILE, "HAS_BIAS": True, "BLOCK_N": 128, "BLOCK_M": 128}),
    "matmul, scales inside": (matmul_kernel, {**TILE, "HAS_BIAS": False, "ONE_SCALE": False, "BLOCK_K": 32}),
    "splitk": (splitk_kernel, TILE),
    "splitk asymmetric": (splitk_kernel, {**TILE, "SYMMETRIC": False}),
    "splitk reduce": (splitk_reduce_kernel, {"HAS_BIAS": True, "BLOCK": 1024}),
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
        options = {"num_warps": 8 if constants.get("BLOCK_M") == 128 else 4}
        for chip, target in TARGETS.items():
            source = ASTSource(kernel, signature, constants, aligned(kernel.arg_names))
            yield chip, name, triton_compile(source, target=target, options=options)


def shipped() -> Iterator[tuple[str, str, Any]]:
    """The Hopper kernels with every set of options in the table."""
    entries = {json.dumps([entry.kernel, entry.options]): entry for entry in hopper.table()}
    for entry in entries.values():
        options = dict(entry.options)
        name = f"{entry.kernel} {options}"
        yield "sm_90", name, gluon_kernel(entry.kernel, options, entry.tokens)
        if options.get("splits", 1) > 1:
            yield "sm_90", f"reduce {options}", gluon_kernel("reduce", options, entry.tokens)


def gluon_kernel(kind: str, options: dict[str, int], tokens: int) -> Any:
    """One Hopper kernel as its launcher would have it compiled."""
    rows = 16 * options.get("warps", 8)
    common = {"HAS_BIAS": True, "RASTER": options.get("raster")}
    if kind == "decode":
        constants = {"GROUP": 128, "HAS_BIAS": True, "TAIL": True, "STEP": 2, "ROWS": options["rows"],
                     "TOKENS": 8 if tokens <= 8 else 16, "BUFFERS": options["buffers"],
                     "num_warps": options["warps"]}  # fmt: skip
        return gluon_compile(decode_kernel, constants, POINTERS, options["warps"])
    if kind == "reduce":
        constants = {**common, "ROWS": rows, "TOKENS": options["tokens"], "SPLITS": options["splits"],
                     "BLOCK_ROWS": REDUCE_ROWS, "BLOCK_TOKENS": min(REDUCE_TOKENS, options["tokens"])}  # fmt: skip
        return gluon_compile(reduce_kernel, constants, POINTERS, 4)
    constants = {**common, "GROUP": 128, "SPLITS": options["splits"], "BUFFERS": options["buffers"]}
    kernel, width, warps = (batch_kernel, rows, options.get("warps", 4)) if kind == "batch" else (prefill_kernel, 64, 4)
    if kind == "batch":
        constants["num_warps"] = warps
    boxes = {"x_desc": box(options["tokens"], 64), "y_desc": box(options["tokens"], width), "scale_ptr": "*u16"}
    return gluon_compile(kernel, constants, {**POINTERS, **boxes}, warps)


def box(rows: int, columns: int) -> str:
    """The type of a descriptor for boxes [rows, columns] in bf16."""
    return f"tensordesc<bf16[{rows}, {columns}],{gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)!r}>"


def gluon_compile(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int) -> Any:
    """The kernel for Hopper."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names}
    source = GluonASTSource(
        kernel, signature, {(names.index(name),): constants[name] for name in constants}, attributes
    )
    return triton_compile(source, target=TARGETS["sm_90"], options={"num_warps": warps, "launch_pdl": True})


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
            print(f"{chip}\t{name}\t{','.join(sorted(compiled.asm))}\t{local_bytes(compiled)}", flush=True)
