"""The kernel order of packed weights, and the unpacking that the Hopper kernels share.

A tensor core takes the weights of 16 rows × 16 columns from the registers of a warp: lane 4g + c holds, of rows g and
g + 8, columns 2c, 2c + 1, 2c + 8 and 2c + 9. In kernel order these eight codes are one word, and the words of a block
of 16 rows × 64 columns (four such tiles) are 512 bytes in a row, so that one 16-byte load brings a lane its share:

    words [N/16, K/64, 128]:  word 16g + 4c + t of a block = tile t of lane 4g + c
    bits of a word:           nibble 2j + e and nibble 4 + 2j + e = row g + 8e, columns 16t + 8j + 2c and + 1

Low and high half of `(word >> 4i) & 0x000f000f` are then two neighbours of a row. OR-ed into the mantissa of 128 (bf16)
or 1024 (fp16) they are exact numbers, and one subtraction gives the codes. No step moves data between lanes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS, COLUMNS, WORDS = 16, 64, 128  # of a block


def _unpacking(magic: int, offset: int, kind: str, *, scaled: bool) -> str:
    """PTX from a word (and the scales of its two rows, each twice in a register) to eight weights."""
    lines = [f"lop3.b32 a0, $8, 0x000f000f, {magic:#010x}, 0xea;"]
    for i in range(1, 4):
        lines += [f"shr.u32 t, $8, {4 * i};", f"lop3.b32 a{i}, t, 0x000f000f, {magic:#010x}, 0xea;"]
    lines.append(f"mov.b32 t, {offset:#010x};")
    lines += [f"sub.{kind} a{i}, a{i}, t;" for i in range(4)]
    if scaled:
        lines += [f"mul.{kind} a{i}, a{i}, ${9 + i % 2};" for i in range(4)]
    lines += [f"mov.b32 {{${2 * i},${2 * i + 1}}}, a{i};" for i in range(4)]
    return "{\n.reg .b32 t, a0, a1, a2, a3;\n" + "\n".join(lines) + "\n}"


# 128 + nibble − 136 in bf16, 1024 + nibble − 1032 in fp16: exact in both.
CODES_BF16 = gl.constexpr(_unpacking(0x43004300, 0x43084308, "bf16x2", scaled=False))
CODES_FP16 = gl.constexpr(_unpacking(0x64006400, 0x64086408, "f16x2", scaled=False))
WEIGHTS_BF16 = gl.constexpr(_unpacking(0x43004300, 0x43084308, "bf16x2", scaled=True))
WEIGHTS_FP16 = gl.constexpr(_unpacking(0x64006400, 0x64086408, "f16x2", scaled=True))


@gluon.constexpr_function
def eight(dtype):
    """The types of eight results."""
    return (dtype,) * 8


EIGHT_OF_ONE = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")
EIGHT_OF_THREE = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")


@gluon.jit
def _joined(w):
    left = gl.join(gl.join(w[0], w[1]), gl.join(w[2], w[3]))
    right = gl.join(gl.join(w[4], w[5]), gl.join(w[6], w[7]))
    return gl.join(left, right)


@gluon.jit
def codes_of(words, dtype: gl.constexpr):
    """Words [..., g, c, t] → codes [..., g, c, t, 2, 2, 2]: neighbour in the row, row + 8, columns + 8."""
    asm: gl.constexpr = CODES_BF16 if dtype == gl.bfloat16 else CODES_FP16
    types: gl.constexpr = eight(dtype)
    return _joined(gl.inline_asm_elementwise(asm, EIGHT_OF_ONE, [words], dtype=types, is_pure=True, pack=1))


@gluon.jit
def weights_of(words, scale, scale_8, dtype: gl.constexpr):
    """As `codes_of`, times the scales of rows g and g + 8, each given twice in an int32."""
    asm: gl.constexpr = WEIGHTS_BF16 if dtype == gl.bfloat16 else WEIGHTS_FP16
    types: gl.constexpr = eight(dtype)
    operands = [words, scale, scale_8]
    return _joined(gl.inline_asm_elementwise(asm, EIGHT_OF_THREE, operands, dtype=types, is_pure=True, pack=1))


@gluon.jit
def wait_for_predecessor():
    """Programmatic dependent launch: go on when the kernel before has finished and its writes are visible."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def release_successor():
    """Programmatic dependent launch: the next kernel may start, and load its weights, while this one runs."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
