from typing import Any

import pytest
import torch
from products import TOLERANCE, operands, relative_error

from formats import codec
from formats.layout import Scheme

pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

from runtime.activations import to_fp8
from runtime.kernels import hopper, hopper_fp8, hopper_tiles
from runtime.repack import arrange

hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
DTYPES = [torch.bfloat16, torch.float16]
SCHEMES = [
    Scheme(-1), Scheme(16), Scheme(32), Scheme(64), Scheme(128), Scheme(192), Scheme(256),
    Scheme(-1, symmetric=False), Scheme(32, symmetric=False), Scheme(128, symmetric=False),
]  # fmt: skip
SHAPES = [(8, 8), (24, 200), (136, 1032), (2048, 2048), (1000, 4096)]


def check(
    tokens: int,
    rows: int,
    columns: int,
    scheme: Scheme,
    dtype: torch.dtype,
    kernel: str,
    options: dict[str, Any],
) -> None:
    x, quantized, bias = operands(tokens, rows, columns, scheme, dtype, "cuda")
    b = bias if options["splits"] % 2 else None
    matrix = arrange(quantized)
    group = hopper.ONE_GROUP if scheme.groups(columns) == 1 else scheme.group_size
    call = hopper.KERNELS[kernel]
    y = call(x, matrix.packed, matrix.scale, matrix.zero_point, b, group, **options)
    assert relative_error(y, x, quantized, b, scheme) <= TOLERANCE[dtype]


def combinations(options: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Scheme]]:
    """Every scheme and every set of options, but not each with each: they are compiled anew."""
    count = max(len(options), len(SCHEMES)) + 1
    return [(options[i % len(options)], SCHEMES[i % len(SCHEMES)]) for i in range(count)]


def dtype_of(options: dict[str, Any], scheme: Scheme) -> torch.dtype:
    """Both types in turn."""
    return DTYPES[(SCHEMES.index(scheme) + options["step"] + options["splits"]) % 2]


DECODE = [
    {"rows": r, "warps": w, "splits": k, "step": s, "buffers": b}
    for r, w, k, s, b in [(16, 4, 1, 2, 4), (32, 8, 2, 1, 2), (16, 8, 1, 2, 2), (64, 4, 4, 1, 3), (128, 4, 1, 1, 2),
                          (32, 4, 2, 4, 2)]
]  # fmt: skip
BATCH = [
    {"tokens": t, "warps": w, "splits": k, "raster": 8, "step": s, "buffers": b}
    for t, w, k, s, b in [(32, 4, 1, 2, 3), (64, 8, 2, 1, 5), (128, 4, 1, 2, 3), (64, 4, 3, 4, 2), (16, 4, 1, 4, 3)]
]
PREFILL = [
    {"rows": r, "tokens": t, "programs": p, "splits": k, "raster": 4, "step": s, "buffers": b}
    for r, t, p, k, s, b in [
        (128, 256, 1, 1, 1, 4), (128, 128, 1, 2, 2, 4), (256, 128, 1, 1, 2, 3), (256, 64, 1, 2, 4, 2),
        (128, 64, 2, 3, 2, 3), (128, 16, 1, 1, 4, 4),
    ]
]  # fmt: skip


@pytest.mark.gpu
@hopper_only
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("options", "scheme"), combinations(DECODE), ids=str)
def test_decode_agrees_with_the_codec(options: dict[str, Any], scheme: Scheme) -> None:
    for (rows, columns), tokens in zip(SHAPES, ((1, 8), (2, 9), (3, 16), (8, 32), (1, 19)), strict=True):
        for few in tokens:
            box = next(box for box in (1, 8, 16, 32) if box >= few)
            check(few, rows, columns, scheme, dtype_of(options, scheme), "decode", {**options, "tokens": box})


@pytest.mark.gpu
@hopper_only
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("options", "scheme"), combinations(BATCH), ids=str)
def test_batch_agrees_with_the_codec(options: dict[str, Any], scheme: Scheme) -> None:
    for (rows, columns), several in zip(SHAPES, ((1, 64), (16, 100), (17, 250), (65, 128), (129, 300)), strict=True):
        fitting = {**options, "splits": min(options["splits"], max(1, columns // (64 * options["step"])))}
        for tokens in several:
            check(tokens, rows, columns, scheme, dtype_of(options, scheme), "batch", fitting)


@pytest.mark.gpu
@hopper_only
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("options", "scheme"), combinations(PREFILL), ids=str)
def test_prefill_agrees_with_the_codec(options: dict[str, Any], scheme: Scheme) -> None:
    for (rows, columns), several in zip(SHAPES, ((1, 700), (16, 300), (63, 511), (128, 1025), (129, 256)), strict=True):
        fitting = {**options, "splits": min(options["splits"], max(1, columns // (64 * options["step"])))}
        for tokens in several:
            check(tokens, rows, columns, scheme, dtype_of(options, scheme), "prefill", fitting)


@pytest.mark.gpu
@hopper_only
def test_tokens_are_rounded_to_fp8_as_defined() -> None:
    x = torch.randn(37, 200, device="cuda").bfloat16() * torch.logspace(-6, 6, 37, device="cuda")[:, None].bfloat16()
    x[5] = 0
    codes, scale = hopper_fp8.quantize_tokens(x)
    expected, expected_scale = to_fp8(x)
    place = torch.arange(codes.shape[1], device="cuda")
    column = place // 16 * 16 + place % 16 // 4 * 2 + place % 2 * 8 + place % 4 // 2
    filled = torch.nn.functional.pad(expected.view(torch.uint8), (0, codes.shape[1] - 200))
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes.view(torch.uint8), filled[:, column])


@pytest.mark.gpu
@hopper_only
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{"tokens": 256, "raster": 8, "buffers": 4}, {"tokens": 128, "raster": 4, "buffers": 6}]
)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_fp8_multiplies_the_rounded_tokens(
    rows: int, columns: int, options: dict[str, int], dtype: torch.dtype
) -> None:
    for tokens, scheme in zip((1, 100, 300, 513), (Scheme(-1), Scheme(64), Scheme(128), Scheme(192)), strict=True):
        x, quantized, bias = operands(tokens, rows, columns, scheme, dtype, "cuda")
        matrix = arrange(quantized)
        group = hopper.ONE_GROUP if scheme.groups(columns) == 1 else scheme.group_size
        y = hopper_fp8.fp8(x, matrix.packed, matrix.scale, None, bias, group, **options)
        codes, scale = to_fp8(x)
        rounded = codes.double() * scale.double()[:, None]
        assert relative_error(y, rounded, quantized, bias, scheme) <= TOLERANCE[dtype]


@pytest.mark.gpu
@hopper_only
def test_prefill_splits_only_what_follows_whole_waves() -> None:
    options = {
        "rows": 128, "tokens": 256, "programs": 1, "splits": 3, "raster": 4, "step": 1, "buffers": 4,
    }  # fmt: skip
    check(512, 128 * 100, 1024, Scheme(128), torch.bfloat16, "prefill", options)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("tokens", [1, 16, 100, 700])
def test_a_matrix_may_have_more_elements_than_32_bits_count(tokens: int) -> None:
    rows, columns, tail = (1 << 17) + 128, 1 << 14, 256
    generator = torch.Generator("cuda").manual_seed(0)
    packed = torch.randint(-(1 << 31), 1 << 31, (rows, columns // 8), generator=generator, device="cuda").int()
    scale = torch.rand(rows, columns // 128, generator=generator, device="cuda").bfloat16() / 100 + 0.01
    matrix = arrange(codec.Quantized(packed, scale, None))
    x = torch.randn(tokens, columns, generator=generator, device="cuda").bfloat16()
    y = hopper.hopper_product(x, matrix, None, 128)
    last = codec.Quantized(packed[-tail:], scale[-tail:], None)
    assert relative_error(y[:, -tail:], x, last, None, Scheme(128)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@hopper_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tokens", [1, 16, 100, 700])
def test_a_matrix_runs_on_the_gpu_where_it_is(tokens: int) -> None:
    x, quantized, _ = operands(tokens, 2048, 2048, Scheme(128), torch.bfloat16, "cuda:0")
    here = hopper.hopper_product(x, arrange(quantized), None, 128)
    moved = codec.Quantized(quantized.packed.to("cuda:1"), quantized.scale.to("cuda:1"), None)
    there = hopper.hopper_product(x.to("cuda:1"), arrange(moved), None, 128)
    assert there.device == torch.device("cuda:1")
    assert torch.equal(there.to("cuda:0"), here)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("tokens", [1, 16, 100, 700])
def test_every_run_gives_the_same_bits(tokens: int) -> None:
    x, quantized, _ = operands(tokens, 4096, 8192, Scheme(128), torch.bfloat16, "cuda")
    matrix = arrange(quantized)
    first = hopper.hopper_product(x, matrix, None, 128)
    assert all(torch.equal(first, hopper.hopper_product(x, matrix, None, 128)) for _ in range(20))


@pytest.mark.gpu
@hopper_only
def test_a_chain_of_calls_waits_for_its_inputs() -> None:
    # Programmatic dependent launch: a kernel starts before the one that makes its input has ended.
    x, quantized, _ = operands(4, 2048, 2048, Scheme(128), torch.bfloat16, "cuda")
    matrix = arrange(quantized)
    expected = x
    for _ in range(6):
        expected = hopper.hopper_product(expected, matrix, None, 128)
        expected = expected / expected.norm()
        torch.cuda.synchronize()
    found = x
    for _ in range(6):
        found = hopper.hopper_product(found, matrix, None, 128)
        found = found / found.norm()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("rows", "columns", "scheme", "dtype"),
    [
        (8, 12, Scheme(-1), torch.bfloat16),
        (9, 64, Scheme(-1), torch.bfloat16),
        (64, 256, Scheme(8), torch.bfloat16),
        (64, 256, Scheme(64), torch.float32),
    ],
)
def test_the_hopper_kernels_take_only_what_they_can(
    rows: int, columns: int, scheme: Scheme, dtype: torch.dtype
) -> None:
    assert not hopper.takes(rows, columns, scheme, dtype)
    assert hopper.takes(64, 256, Scheme(64), torch.bfloat16)


def test_the_copy_engine_reads_a_siblings_scales_in_place() -> None:
    whole = torch.arange(4 * 48, dtype=torch.int16).view(4, 48).view(torch.bfloat16)
    part = whole[:, 16:32]
    box = hopper_tiles.rows_box(part, 16)
    flat = torch.as_strided(box.base, box.shape, box.strides)
    assert torch.equal(flat[:16].view(torch.int16), whole[0, 16:32].view(torch.int16))
    assert torch.equal(flat[3 * part.stride(0) :].view(torch.int16), whole[3, 16:32].view(torch.int16))
