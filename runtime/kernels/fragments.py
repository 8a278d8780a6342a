"""The kernel order of packed weights, and the unpacking that the Hopper kernels share.

A tensor core takes the weights of 16 rows × 16 columns from the registers of a warp: lane 4g + c holds, of rows g and
g + 8, columns 2c, 2c + 1, 2c + 8 and 2c + 9. In kernel order these eight codes are one word, and the words of a block
of 16 rows × 64 columns (four such tiles) are 512 bytes in a row, so that one 16-byte load brings a lane its share::

    words [N/16, K/64, 128]:  word 16g + 4c + t of a block = tile t of lane 4g + c
    bits of a word:           nibble 2j + e and nibble 4 + 2j + e = row g + 8e, columns 16t + 8j + 2c and + 1

Low and high half of `(word >> 4i) & 0x000f000f` are then two neighbours of a row. OR-ed into the mantissa of 128 (bf16)
or 1024 (fp16) they are exact numbers, and one subtraction gives the codes. No step moves data between lanes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _unpacking(magic: int, offset: int | None, kind: str, *, scaled: bool) -> str:
    """PTX from a word to eight weights; $9 and $10 are the scales of its two rows, $11 and $12 their offsets."""
    lines = [f"lop3.b32 a0, $8, 0x000f000f, {magic:#010x}, 0xea;"]
    for i in range(1, 4):
        lines += [f"shr.u32 t, $8, {4 * i};", f"lop3.b32 a{i}, t, 0x000f000f, {magic:#010x}, 0xea;"]
    if offset is not None:
        lines.append(f"mov.b32 t, {offset:#010x};")
    lines += [f"sub.{kind} a{i}, a{i}, {'t' if offset is not None else f'${11 + i % 2}'};" for i in range(4)]
    if scaled:
        lines += [f"mul.{kind} a{i}, a{i}, ${9 + i % 2};" for i in range(4)]
    lines += [f"mov.b32 {{${2 * i},${2 * i + 1}}}, a{i};" for i in range(4)]
    return "{\n.reg .b32 t, a0, a1, a2, a3;\n" + "\n".join(lines) + "\n}"


# 128 + nibble − 136 in bf16, 1024 + nibble − 1032 in fp16: exact in both; so is the difference of two nibbles.
MAGIC_BF16, MAGIC_FP16 = 0x43004300, 0x64006400
CODES_BF16 = gl.constexpr(_unpacking(MAGIC_BF16, 0x43084308, "bf16x2", scaled=False))
CODES_FP16 = gl.constexpr(_unpacking(MAGIC_FP16, 0x64086408, "f16x2", scaled=False))
WEIGHTS_BF16 = gl.constexpr(_unpacking(MAGIC_BF16, 0x43084308, "bf16x2", scaled=True))
WEIGHTS_FP16 = gl.constexpr(_unpacking(MAGIC_FP16, 0x64086408, "f16x2", scaled=True))
SHIFTED_BF16 = gl.constexpr(_unpacking(MAGIC_BF16, None, "bf16x2", scaled=True))
SHIFTED_FP16 = gl.constexpr(_unpacking(MAGIC_FP16, None, "f16x2", scaled=True))


@gluon.constexpr_function
def eight(dtype):
    """The types of eight results."""
    return (dtype,) * 8


EIGHT_OF_ONE = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")
EIGHT_OF_THREE = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")
EIGHT_OF_FIVE = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r")


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
def shifted_weights_of(words, scale, scale_8, zero, zero_8, dtype: gl.constexpr):
    """As `weights_of`, with the zero points of rows g and g + 8, each twice in an int32, as 128 (or 1024) + nibble."""
    asm: gl.constexpr = SHIFTED_BF16 if dtype == gl.bfloat16 else SHIFTED_FP16
    types: gl.constexpr = eight(dtype)
    operands = [words, scale, scale_8, zero, zero_8]
    return _joined(gl.inline_asm_elementwise(asm, EIGHT_OF_FIVE, operands, dtype=types, is_pure=True, pack=1))


# The byte n is n · 2⁻⁹ in e4m3 for n up to 15 (subnormals, then the first exponent): |nibble − 8| as it is, and a sign.
CODE_UNIT = gl.constexpr(2.0**-9)
FP8 = gl.constexpr("""{
.reg .b32 eights, none, a, b;
mov.b32 eights, 0x08080808;
mov.b32 none, 0;
and.b32 a, $2, 0x0f0f0f0f;
vabsdiff4.u32.u32.u32 a, a, eights, none;
shl.b32 b, $2, 4;
lop3.b32 $0, a, b, 0x80808080, 0xf2;
shr.u32 b, $2, 4;
and.b32 b, b, 0x0f0f0f0f;
vabsdiff4.u32.u32.u32 b, b, eights, none;
lop3.b32 $1, b, $2, 0x80808080, 0xf2;
}""")


@gluon.constexpr_function
def with_eight(layout):
    """The layout of words, with the eight codes of each in two more dimensions: row + 8, column."""
    longer = [[*base, 0, 0] for base in layout.reg_bases]
    zeros = [0] * len(layout.shape)
    return gl.DistributedLinearLayout(
        [[*zeros, 0, 1], [*zeros, 0, 2], [*zeros, 1, 0], *longer], [[*base, 0, 0] for base in layout.lane_bases],
        [[*base, 0, 0] for base in layout.warp_bases], [], [*layout.shape, 2, 4],
    )  # fmt: skip


@gluon.jit
def codes_in_fp8(words):
    """Words → their codes · CODE_UNIT [..., 2, 4] in e4m3: row + 8; columns 2c, 2c + 8, 2c + 1, 2c + 9."""
    layout: gl.constexpr = with_eight(words.type.layout)
    RANK: gl.constexpr = len(words.shape)
    words = gl.convert_layout(words, gl.SliceLayout(RANK, gl.SliceLayout(RANK + 1, layout)), assert_trivial=True)
    words = gl.expand_dims(gl.expand_dims(words, RANK), RANK + 1)
    SHAPE: gl.constexpr = layout.shape
    words += gl.zeros(SHAPE, gl.int32, layout=layout)
    codes = gl.inline_asm_elementwise(FP8, "=r,=r,r,r,r,r,r,r,r,r", [words], dtype=gl.int8, is_pure=True, pack=8)
    return codes.to(gl.float8e4nv, bitcast=True)


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
