"""Models in other int4 formats become checkpoints of this one with the same weights."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import add_to_config, contents, random, stored, write_checkpoint
from safetensors.torch import load_file
from test_export import checkpoint, weights
from torch import Tensor

from converter import chunks
from converter.convert import convert, recipe_for
from converter.export import export
from converter.plan import make_plan
from converter.source import open_source
from formats.checkpoint import Checkpoint
from formats.errors import CheckpointError, UsageError
from formats.layout import Scheme
from formats.manifest import Manifest

ROWS, COLUMNS, GROUP = 16, 64, 32
MODULE = "model.layers.0.a"
SHIFTS = 4 * torch.arange(8)


def take_over(source: Path, out: Path, symmetric: bool | None = None) -> Manifest:
    opened = open_source(str(source))
    plan = make_plan(opened, recipe_for(opened, None, symmetric, None, (), (), None))
    return convert(opened, plan, out, [torch.device("cpu")])


@pytest.mark.parametrize("chunk_bytes", [None, 1000])
@pytest.mark.parametrize(
    ("to", "scheme"),
    [
        *product(("compressed-tensors", "gptq", "awq"), (Scheme(128), Scheme(128, symmetric=False), Scheme(-1))),
        ("mlx", Scheme(128)),
    ],
    ids=str,
)
def test_there_and_back_gives_the_same_bytes(
    to: str, scheme: Scheme, chunk_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk_bytes:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    ours = checkpoint(tmp_path, scheme)
    export(ours, tmp_path / "theirs", to)
    manifest = take_over(tmp_path / "theirs", tmp_path / "again", scheme.symmetric)
    before, after = contents(tmp_path / "i4"), contents(tmp_path / "again")
    assert after.keys() == before.keys()
    before_tensors, after_tensors = stored(tmp_path / "i4"), stored(tmp_path / "again")
    assert after_tensors.keys() == before_tensors.keys()
    for name, tensor in before_tensors.items():
        assert after_tensors[name].dtype == tensor.dtype
        assert torch.equal(after_tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads(after["config.json"]) == json.loads(before["config.json"])
    Checkpoint(tmp_path / "again").verify()
    assert (manifest.recipe.method, manifest.recipe.scheme) == (f"relayout of {to}", scheme)
    rows = {row.name: row for row in manifest.tensors}
    for row in ours.manifest.tensors:
        found = rows[row.name]
        assert (found.dtype, found.shape, found.quantized) == (row.dtype, row.shape, row.quantized)
        assert found.sha256 == row.sha256
        assert found.error is None
        assert not row.quantized or found.reason == f"int4 already ({to})"


def words(nibbles: Tensor) -> Tensor:
    """Nibbles [..., 8] as words [...], the first lowest: by arithmetic."""
    found = (nibbles.long() << SHIFTS).sum(-1)
    return torch.where(found >= 2**31, found - 2**32, found).int()


def codes(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed))


def scales(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return random(ROWS, COLUMNS // GROUP, seed=7, dtype=torch.float32).abs().add(0.01).bfloat16().to(dtype)


def compressed_tensors(q: Tensor, z: Tensor | None, scale: Tensor) -> dict[str, Tensor]:
    parts = {"weight_packed": words(q.unflatten(1, (-1, 8))), "weight_scale": scale}
    parts["weight_shape"] = torch.tensor(q.shape)
    return parts if z is None else {**parts, "weight_zero_point": words(z.T.unflatten(1, (-1, 8))).T.contiguous()}


def gptq(q: Tensor, z: Tensor | None, scale: Tensor, version: int = 1) -> dict[str, Tensor]:
    z = torch.full(scale.shape, 8) if z is None else z
    return {
        "qweight": words(q.unflatten(1, (-1, 8))).T.contiguous(),
        "qzeros": words((z.T - int(version == 1)).unflatten(1, (-1, 8))),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(COLUMNS) // GROUP).int(),
    }


def awq(q: Tensor, z: Tensor | None, scale: Tensor) -> dict[str, Tensor]:
    z = torch.full(scale.shape, 8) if z is None else z
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        "qweight": words(q.T.unflatten(1, (-1, 8))[..., order]),
        "qzeros": words(z.T.unflatten(1, (-1, 8))[..., order]),
        "scales": scale.T.contiguous(),
    }


def mlx(q: Tensor, z: Tensor | None, scale: Tensor) -> dict[str, Tensor]:
    bias = -(8 if z is None else z) * scale.float()
    return {
        "weight": words(q.unflatten(1, (-1, 8))).view(torch.uint32),
        "scales": scale,
        "biases": bias.to(scale.dtype),
    }


def ct_config(symmetric: bool = True, **changes: object) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": symmetric, **changes}
    group = {"targets": ["Linear"], "weights": args, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
MLX = {"bits": 4, "group_size": GROUP}
ANY = (None, codes(2, ROWS, COLUMNS // GROUP))
SOURCES: dict[str, tuple[Callable[..., dict[str, Tensor]], dict[str, Any], Tensor | None]] = {
    "compressed-tensors": (compressed_tensors, ct_config(), None),
    "compressed-tensors with zero points": (compressed_tensors, ct_config(symmetric=False), ANY[1]),
    "gptq": (gptq, GPTQ, None),
    "gptq with zero points from 1": (gptq, {**GPTQ, "sym": False}, ANY[1].clamp(1)),
    "gptq version 2": (
        lambda *x: gptq(*x, version=2), {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, ANY[1]),
    "awq": (awq, AWQ, ANY[1]),
    "mlx": (mlx, MLX, None),
}  # fmt: skip


def write(folder: Path, parts: dict[str, Tensor], settings: dict[str, Any], shards: int = 1) -> Path:
    """A checkpoint of one matrix in int4, and a few tensors that are not."""
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    kept = {"lm_head.weight": random(32, COLUMNS), "router.weight": random(8, COLUMNS), "b.weight": random(8, COLUMNS)}
    write_checkpoint(folder, {**tensors, **kept, f"{MODULE}.bias": random(ROWS)}, shards)
    add_to_config(folder, quantization_config=settings)
    if "quant_method" not in settings:
        add_to_config(folder, quantization=settings)
    return folder


@pytest.mark.parametrize("shards", [1, 7])  # with 7 the parts of a matrix are in files of their own
@pytest.mark.parametrize("kind", SOURCES)
def test_what_others_wrote_keeps_its_weights(kind: str, shards: int, tmp_path: Path) -> None:
    layout, settings, zero = SOURCES[kind]
    q, scale = codes(1, ROWS, COLUMNS), scales()
    source = write(tmp_path / "source", layout(q, zero, scale), settings, shards)
    (source / "quantize_config.json").write_text("{}")
    manifest = take_over(source, tmp_path / "out")
    z = torch.full(scale.shape, 8) if zero is None else zero
    expected = (q - z.repeat_interleave(GROUP, 1)) * scale.float().repeat_interleave(GROUP, 1)
    assert torch.equal(weights(tmp_path / "out", manifest)[f"{MODULE}.weight"], expected)
    assert manifest.recipe.scheme == Scheme(GROUP, symmetric=zero is None)
    found, before = stored(tmp_path / "out"), {}
    for path in source.glob("*.safetensors"):
        before |= load_file(path)
    for name in ("lm_head.weight", "router.weight", "b.weight", f"{MODULE}.bias"):
        assert torch.equal(found[name], before[name])
    reasons = {row.name: row.reason for row in manifest.tensors}
    assert reasons["b.weight"] == "not int4 in the source"
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_progress_counts_the_bytes_of_the_model(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "source", gptq(codes(1, ROWS, COLUMNS), None, scales()), GPTQ)))
    plan = make_plan(source, recipe_for(source, None, None, None, (), (), None))
    done: list[int] = []
    convert(source, plan, tmp_path / "out", [torch.device("cpu")], progress=done.append)
    assert sum(done) == source.nbytes


def test_fp32_scales_are_taken_where_16_bits_hold_them(tmp_path: Path) -> None:
    q = codes(1, ROWS, COLUMNS)
    source = write(tmp_path / "source", gptq(q, None, scales(torch.float32)), GPTQ)
    take_over(source, tmp_path / "out")
    assert torch.equal(stored(tmp_path / "out")[f"{MODULE}.weight_scale"], scales())
    source = write(tmp_path / "inexact", gptq(q, None, scales(torch.float32) + 1e-6), GPTQ)
    with pytest.raises(CheckpointError, match=rf"'{MODULE}\.weight' \(gptq\): 32 of 32 scales .* do not fit"):
        take_over(source, tmp_path / "out2")


def test_groups_with_a_scale_of_zero_are_zeros(tmp_path: Path) -> None:
    q, scale = codes(1, ROWS, COLUMNS), scales()
    scale[3, 1] = 0
    manifest = take_over(write(tmp_path / "source", awq(q, ANY[1], scale), AWQ), tmp_path / "out")
    found = weights(tmp_path / "out", manifest)[f"{MODULE}.weight"]
    assert (found[3, GROUP:] == 0).all()
    assert torch.equal(found[3, :GROUP], (q - ANY[1].repeat_interleave(GROUP, 1))[3, :GROUP] * scale[3, 0].float())


def changed(parts: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in {**parts, **changes}.items() if tensor is not None}


def spoiled(numbers: Tensor) -> Tensor:
    found = numbers.clone(memory_format=torch.contiguous_format)
    found[0, 1] = float("nan")
    return found


Q = codes(1, ROWS, COLUMNS)
ORDERED = torch.arange(COLUMNS).int() // GROUP
PLAIN, COMPRESSED, AFFINE = (layout(Q, None, scales()) for layout in (gptq, compressed_tensors, mlx))
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "8 bits": (PLAIN, {**GPTQ, "bits": 8}, r"gptq: bits is 8, expected 4"),
    "a format of its own": (PLAIN, {**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'ma"),
    "odd groups": (PLAIN, {**GPTQ, "group_size": 12}, "group_size is 12, expected -1 or a multiple of 8"),
    "other groups": (PLAIN, {**GPTQ, "group_size": 16}, "its qzeros is .*, expected I32"),
    "act-order": (changed(PLAIN, g_idx=ORDERED.flip(0)), GPTQ, "act-order"),
    "zero points, said to have none": (gptq(Q, ANY[1].clamp(1), scales()), GPTQ, "zero point; give --scheme asym"),
    "a zero point of 16": (gptq(Q, torch.full((ROWS, 2), 16), scales()), {**GPTQ, "sym": False}, "zero point is 16"),
    "no scales": (changed(PLAIN, scales=None), GPTQ, "its scales is missing"),
    "AWQ by another kernel": (awq(Q, ANY[1], scales()), {**AWQ, "version": "gemv"}, "version is 'gemv'"),
    "compressed activations": (
        COMPRESSED,
        {**ct_config(), "config_groups": {"a": {**ct_config()["config_groups"]["group_0"], "input_activations": {}}}},
        "input_activations is {}"),
    "compressed in act-order": (
        COMPRESSED, ct_config(actorder="group"), "actorder is 'group'"),
    "compressed with a permutation": (
        {**COMPRESSED, "weight_g_idx": ORDERED}, ct_config(), "belongs to a model that"),
    "compressed otherwise": (
        COMPRESSED, {**ct_config(), "format": "marlin-24"}, "format is 'marlin-24'"),
    "compressed rows that end in a word": (
        changed(COMPRESSED, weight_shape=torch.tensor([ROWS, 60])), ct_config(),
        r"weight_shape is \[16, 60\], expected \[16, 64\]: rows that end within a word .*; convert the model that it"),
    "MLX with other biases": (
        changed(AFFINE, biases=random(ROWS, 2)), MLX, "biases are no whole number of scales"),
    "MLX with zero points": (mlx(Q, torch.full((ROWS, 2), 4), scales()), MLX, "zero point; give --scheme asym"),
    "MLX in 8 bits": (AFFINE, {**MLX, "bits": 8}, "mlx: bits is 8"),
    "MLX by another code": (AFFINE, {**MLX, "mode": "mxfp4"}, "mode is 'mxfp4'"),
    "infinite scales": (gptq(Q, None, scales() / 0), GPTQ, "32 of 32 numbers in scales are NaN or infinite"),
    "a scale that is no number": (
        changed(PLAIN, scales=spoiled(scales().T)), GPTQ, "1 of 32 numbers in scales are NaN or infinite"),
    "MLX with a bias that is no number": (
        changed(AFFINE, biases=spoiled(AFFINE["biases"])), MLX, "1 of 32 numbers in biases are NaN or infinite"),
    "another method": (PLAIN, {**GPTQ, "quant_method": "hqq"}, r"already quantised \(hqq\).* of compr"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_exact_place_is_refused(kind: str, tmp_path: Path) -> None:
    parts, settings, message = REFUSED[kind]
    with pytest.raises(CheckpointError, match=message):
        take_over(write(tmp_path / "source", parts, settings), tmp_path / "out")


def test_zero_points_that_mlx_holds_are_taken_if_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "source", mlx(Q, torch.full((ROWS, 2), 4), scales()), MLX)
    manifest = take_over(source, tmp_path / "out", symmetric=False)
    expected = (Q - 4) * scales().float().repeat_interleave(GROUP, 1)
    assert torch.equal(weights(tmp_path / "out", manifest)[f"{MODULE}.weight"], expected)


def test_an_embedding_in_int4_is_refused(tmp_path: Path) -> None:
    tensors = {f"model.embed_tokens.{part}": tensor for part, tensor in mlx(Q, None, scales()).items()}
    source = write_checkpoint(tmp_path / "source", tensors, shards=1)
    (source / "config.json").write_text(json.dumps({"quantization": MLX}))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight': is in int4, but is kept here \(embedding\)"):
        open_source(str(source))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((64, None, None, (), (), None), "--group-size"),
        ((None, None, "absmax", (), (), None), "--method"),
        ((None, None, None, ("lm_head",), ("router",), None), "--include, --exclude"),
    ],
)
def test_options_that_would_change_numbers_are_refused(options: Any, named: str, tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "source", gptq(Q, None, scales()), GPTQ)))
    with pytest.raises(UsageError, match=rf"in int4 already \(gptq, groups of 32\) .* leave {named} out"):
        recipe_for(source, *options)
    assert recipe_for(source, GROUP, True, None, (), (), None).group_size == GROUP


def test_the_library_s_own_checkpoint_is_taken_over(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    for symmetric in (True, False):
        settings = ct_config(symmetric)
        scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
        state = {"weight": random(20, COLUMNS), "weight_scale": random(20, 2, seed=7).abs() / 2}
        if not symmetric:
            state["weight_zero_point"] = (codes(2, 20, 2) - 8).to(torch.int8)
        parts = PackedQuantizationCompressor.compress(state, scheme)
        expected = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        out = tmp_path / f"out-{symmetric}"
        manifest = take_over(write(tmp_path / f"source-{symmetric}", parts, settings), out)
        assert torch.equal(weights(out, manifest, torch.bfloat16)[f"{MODULE}.weight"], expected)
