"""Exports, read by other people's code or by decoders written here from the published layouts."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import EXAMPLE, SHARED, contents, convert_folder, random, stored, write_checkpoint
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from converter.export import export
from converter.export_cli import command
from formats.checkpoint import Checkpoint
from formats.codec import Quantized, dequantize
from formats.errors import CheckpointError, OutputError
from formats.interop import LAYOUTS
from formats.interop.compressed_tensors import CompressedTensors
from formats.layout import Scheme
from formats.manifest import Manifest

NAMES = ("model.layers.0.a.weight", "model.layers.1.a.weight")
SHIFTS = 4 * np.arange(8)


def checkpoint(
    folder: Path, scheme: Scheme, dtype: torch.dtype = torch.bfloat16, rows: int = 24, columns: int = 512
) -> Checkpoint:
    """Two matrices in two shards, with scales of both signs where there are no zero points."""
    tensors = {
        NAMES[0]: random(rows, columns, seed=1, dtype=dtype),
        NAMES[1]: random(16, columns, seed=2, dtype=dtype),
        "model.norm.weight": random(columns, seed=3, dtype=dtype),
        "lm_head.weight": random(32, columns, seed=4, dtype=dtype),
        "model.embed_tokens.weight": random(32, columns, seed=5, dtype=dtype),
    }
    convert_folder(write_checkpoint(folder / "source", tensors), folder / "i4", scheme, method="search")
    if scheme.symmetric:
        assert (stored(folder / "i4")[f"{NAMES[0]}_scale"] < 0).any()
    return Checkpoint(folder / "i4")


def exported(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def weights(folder: Path, manifest: Manifest, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the codec makes of every matrix."""
    found, scheme = stored(folder), manifest.recipe.scheme
    return {
        row.name: dequantize(
            Quantized(found[f"{row.name}_packed"], found[f"{row.name}_scale"], found.get(f"{row.name}_zero_point")),
            row.matrix.shape[-1],
            scheme,
            dtype,
        )
        for row in manifest.tensors
        if row.quantized
    }


def parts_of(tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The tensors of one module, by numpy: words as unsigned, floats in fp32."""
    module = name.removesuffix("weight")
    found = {full.removeprefix(module): tensor for full, tensor in tensors.items() if full.startswith(module)}
    return {
        part: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy().view(np.uint32)
        for part, tensor in found.items()
    }


def by_gptq(parts: dict[str, Any], first: int) -> Any:
    """qweight [K/8, N] along K, qzeros [G, N/8] along N, less `first`; W[n, k] = (q − z) · s by the group of k."""
    q = (parts["qweight"][:, None, :] >> SHIFTS[None, :, None] & 15).reshape(-1, parts["qweight"].shape[1])
    z = (parts["qzeros"][:, :, None] >> SHIFTS & 15).reshape(len(parts["qzeros"]), -1) + first
    groups = parts["g_idx"]
    return ((q.astype(np.float32) - z[groups].astype(np.float32)) * parts["scales"][groups]).T


def by_awq(parts: dict[str, Any]) -> Any:
    """qweight [K, N/8] and qzeros [G, N/8]: nibble i of word c is of row 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""

    def rows(words: Any) -> Any:
        found = np.empty((words.shape[0], words.shape[1] * 8), dtype=np.float32)
        for i, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            found[:, row::8] = words >> np.uint32(4 * i) & 15
        return found

    q, z = rows(parts["qweight"]), rows(parts["qzeros"])
    size = len(q) // len(z)
    return ((q - np.repeat(z, size, 0)) * np.repeat(parts["scales"], size, 0)).T


def by_mlx(parts: dict[str, Any]) -> Any:
    """w = scale · q + bias, the low nibble first."""
    words = parts["weight"]
    q = (words[:, :, None] >> SHIFTS & 15).reshape(len(words), -1).astype(np.float32)
    size = q.shape[1] // parts["scales"].shape[1]
    return np.repeat(parts["scales"], size, 1) * q + np.repeat(parts["biases"], size, 1)


DECODERS: dict[tuple[str, bool], Callable[[dict[str, Any]], Any]] = {
    ("gptq", True): lambda parts: by_gptq(parts, 1),  # version 1
    ("gptq", False): lambda parts: by_gptq(parts, 0),
    ("awq", True): by_awq,
    ("awq", False): by_awq,
    ("mlx", True): by_mlx,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group_size", "split"), [(256, 128), (128, None), (-1, 64)])
@pytest.mark.parametrize(("to", "symmetric"), DECODERS)
def test_another_decoder_reads_the_same_weights(
    to: str, symmetric: bool, group_size: int, split: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path, Scheme(group_size, symmetric), dtype)
    found = export(source, tmp_path / "out", to, split)
    tensors = exported(tmp_path / "out")
    for name, expected in weights(tmp_path / "i4", source.manifest).items():
        parts = parts_of(tensors, name)
        assert np.array_equal(DECODERS[to, symmetric](parts), expected.numpy())
        assert tensors[name.replace("weight", "biases" if to == "mlx" else "scales")].dtype == dtype
        assert to != "awq" or (parts["scales"] > 0).all()
    assert (found.tensors, found.checked, found.kept) == (2, 2, 3)
    assert found.group_size == (split or group_size)


def test_groups_of_whole_rows(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, Scheme(-1))
    export(source, tmp_path / "out", "gptq")
    parts = parts_of(exported(tmp_path / "out"), NAMES[0])
    assert np.array_equal(by_gptq(parts, 1), weights(tmp_path / "i4", source.manifest)[NAMES[0]].numpy())
    assert parts["scales"].shape == (1, 24)


@pytest.mark.parametrize(
    ("to", "other"),
    [("compressed-tensors", "weight_packed"), ("gptq", "qweight"), ("awq", "qweight"), ("mlx", "weight")],
)
def test_the_rest_of_the_folder(to: str, other: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path, Scheme(128))
    export(source, tmp_path / "out", to)
    out = contents(tmp_path / "out")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(out) == ["LICENSE", "config.json", *shards, "model.safetensors.index.json", "tokenizer.json"]
    before = contents(tmp_path / "source")
    assert (out["LICENSE"], out["tokenizer.json"]) == (before["LICENSE"], before["tokenizer.json"])
    index = json.loads(out["model.safetensors.index.json"])
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "mlx" if to == "mlx" else "pt"}
            assert {name for name, place in index["weight_map"].items() if place == shard} == set(file.keys())
    found = exported(tmp_path / "out")
    kept = {name: tensor for name, tensor in exported(tmp_path / "source").items() if name not in NAMES}
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert NAMES[0].replace("weight", other) in found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def settings(folder: Path, entry: str = "quantization_config") -> Any:
    return json.loads((folder / "config.json").read_text())[entry]


def test_configurations_name_what_is_not_quantised(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, Scheme(128))
    for to in LAYOUTS:
        export(source, tmp_path / to, to)
    found = settings(tmp_path / "compressed-tensors")
    assert found["ignore"] == ["lm_head", r"re:(.*\.)?embed_tokens(\..*)?$"]
    assert found["config_groups"]["group_0"]["weights"]["group_size"] == 128
    found = settings(tmp_path / "gptq")
    assert [rule[:2] for rule in found.pop("dynamic")] == ["-:"] * 2
    assert found == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32",
    }  # fmt: skip
    found = settings(tmp_path / "awq")
    assert found.pop("modules_to_not_convert")[:2] == ["model.embed_tokens", "lm_head"]
    assert found == {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "lm_head": False,
    }  # fmt: skip
    assert settings(tmp_path / "mlx", "quantization") == {"group_size": 128, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize(
    ("to", "scheme", "shape", "message"),
    [
        ("gptq", Scheme(128), (20, 512), r"20 rows are no multiple of 8; compressed-tensors, mlx can"),
        ("awq", Scheme(128), (20, 512), r"20 rows are no multiple of 8; compressed-tensors, mlx can"),
        ("mlx", Scheme(256), (24, 512), r"groups of 256, .*--group-size; compressed-tensors, gptq, awq can"),
        ("mlx", Scheme(128, symmetric=False), (24, 512), r"biases, .* do not fit .*; compressed-tensors, gptq, awq"),
        ("gptq", Scheme(256), (24, 640), r"groups of 256 in 640 columns .* of 256; --group-size 128, or"),
        ("gptq", Scheme(-1), (24, 516), r"516 columns are no multiple of 8; compressed-tensors, awq can"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(
    to: str, scheme: Scheme, shape: tuple[int, int], message: str, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path, scheme, rows=shape[0], columns=shape[1])
    with pytest.raises(CheckpointError, match=rf"i4: tensor '{NAMES[0]}': .*{message}"):
        export(source, tmp_path / "out", to)
    assert not contents(tmp_path / "out")


def test_fused_experts_that_are_kept_are_named_by_their_module(tmp_path: Path) -> None:
    names = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")
    tensors = {"a.weight": random(16, 64), **{name: random(2, 64, 64) for name in names}}
    convert_folder(write_checkpoint(tmp_path / "source", tensors), tmp_path / "i4", Scheme(32), exclude=("mlp.*",))
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", "awq")
    assert settings(tmp_path / "out")["modules_to_not_convert"][0] == "mlp.experts"


def kept_as(to: str, folder: Path) -> Callable[[str], bool]:
    """Whether a program that reads `to` takes the module of its own name for one that is not quantised."""
    found = settings(folder)
    if to == "gptq":  # as vLLM, SGLang and GPTQModel have it
        return lambda name: any(re.match(rule.removeprefix("-:"), name) for rule in found["dynamic"])
    if to == "awq":  # as transformers has it
        return lambda name: any(
            re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(key)
            for key in found["modules_to_not_convert"]
        )
    regex = "re:"  # as compressed-tensors and vLLM have it
    return lambda name: any(
        re.match(rule.removeprefix(regex), name) if rule.startswith(regex) else rule == name for rule in found["ignore"]
    )


BLOCK = "language_model.model.layers"
PARTS = {  # of a checkpoint: their names in a model, and whether they are kept
    f"{BLOCK}.0.q_proj": ("model.language_model.layers.0.q_proj", True),  # excluded
    f"{BLOCK}.1.q_proj": ("model.language_model.layers.1.q_proj", False),
    f"{BLOCK}.10.q_proj": ("model.language_model.layers.10.q_proj", False),
    f"{BLOCK}.1.mlp.gate_proj": ("model.language_model.layers.1.mlp.gate_proj", False),
    f"{BLOCK}.1.mlp.gate": ("model.language_model.layers.1.mlp.router", True),
    f"{BLOCK}.1.patch_embedding": ("model.language_model.layers.1.patch_embedding", True),  # may be a linear layer
    "language_model.lm_head": ("lm_head", True),
    "vision_tower.vision_model.layers.1.q_proj": ("model.vision_tower.layers.1.q_proj", True),
    "visual.merger.0": ("model.visual.merger.0", True),
}  # fmt: skip


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
def test_what_is_kept_is_found_under_other_names(to: str, tmp_path: Path) -> None:
    tensors = {f"{name}.weight": random(16, 64, seed=i) for i, name in enumerate(PARTS)}
    source = write_checkpoint(tmp_path / "source", tensors)
    convert_folder(source, tmp_path / "i4", Scheme(32), exclude=(f"{BLOCK}.0.*",))
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", to)
    is_kept = kept_as(to, tmp_path / "out")
    assert {name: is_kept(name) for name, _ in PARTS.values()} == dict(PARTS.values())


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
def test_a_pattern_that_finds_int4_too_is_not_used(to: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {f"visual.{name}.weight": random(16, 64) for name in ("a", "b")})
    convert_folder(source, tmp_path / "i4", Scheme(32), include=("visual.a",))
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", to)
    is_kept = kept_as(to, tmp_path / "out")
    assert (is_kept("model.visual.a"), is_kept("model.visual.b")) == (False, True)


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_a_kept_name_within_another_is_not_taken_for_it(to: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {"proj.weight": random(16, 64), "a.proj.weight": random(16, 64)})
    convert_folder(source, tmp_path / "i4", Scheme(32), exclude=("proj",))
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", to)
    is_kept = kept_as(to, tmp_path / "out")
    assert (is_kept("proj"), is_kept("a.proj"), is_kept("proj.b")) == (True, False, False)


@pytest.mark.parametrize("kept", [False, True])
def test_heads_that_share_the_embedding_are_no_int4(kept: bool, tmp_path: Path) -> None:
    tensors = {"a.weight": random(16, 64), **({"lm_head.weight": random(16, 64)} if kept else {})}
    convert_folder(write_checkpoint(tmp_path / "source", tensors, shards=1), tmp_path / "i4", Scheme(32))
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", "compressed-tensors")
    is_kept = kept_as("compressed-tensors", tmp_path / "out")
    heads = ("proj_out", "cls.predictions.decoder", "lm_head.decoder", "decoder")
    assert [is_kept(name) for name in heads] == [not kept] * len(heads)
    assert is_kept("lm_head")
    assert not is_kept("model.decoder")


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_head_in_int4_is_not_tied_to_the_embedding(to: str, tmp_path: Path) -> None:
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "hidden_size": 64}}
    tensors = {"a.weight": random(16, 64), "language_model.lm_head.weight": random(16, 64)}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    for name, include in (("kept", ()), ("int4", ("*lm_head",))):
        convert_folder(source, tmp_path / name, Scheme(32), include=include)
        export(Checkpoint(tmp_path / name), tmp_path / f"{name}-out", to)
    assert settings(tmp_path / "kept-out", "tie_word_embeddings") is True
    assert settings(tmp_path / "int4-out", "tie_word_embeddings") is False
    assert settings(tmp_path / "int4-out", "text_config") == {"tie_word_embeddings": False, "hidden_size": 64}


def test_groups_are_not_joined(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, Scheme(64))
    with pytest.raises(CheckpointError, match="groups of 64 .* of 128; --group-size 64, or"):
        export(source, tmp_path / "out", "gptq", 128)


def test_a_wrong_relayout_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path, Scheme(128))
    relayout = CompressedTensors.relayout

    def flipped(self: CompressedTensors, matrix: Quantized, columns: int) -> dict[str, Tensor]:
        parts = relayout(self, matrix, columns)
        return {**parts, "weight_packed": parts["weight_packed"] ^ torch.eye(*parts["weight_packed"].shape).int()}

    monkeypatch.setattr(CompressedTensors, "relayout", flipped)
    with pytest.raises(CheckpointError, match="weights differ in compressed-tensors"):
        export(source, tmp_path / "out", "compressed-tensors")
    assert not contents(tmp_path / "out")


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, Scheme(128))
    path = tmp_path / "i4" / "model-00002-of-00002.i4.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        export(source, tmp_path / "out", "gptq")
    assert not contents(tmp_path / "out")


def test_only_a_new_or_empty_folder_is_written_to(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, Scheme(128))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitattributes").touch()
    export(source, tmp_path / "out", "gptq")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=r"holds LICENSE, config\.json, .*; choose an empty or new folder"):
        export(source, tmp_path / "out", "awq")
    assert contents(tmp_path / "out") == before
    with pytest.raises(OutputError, match="source folder"):
        export(source, tmp_path / "i4" / "inside", "awq")


def test_the_command_says_what_it_checked(tmp_path: Path) -> None:
    checkpoint(tmp_path, Scheme(256))
    run = CliRunner().invoke
    out = tmp_path / "out"
    found = run(command, [str(tmp_path / "i4"), str(out), "--to", "gptq", "--group-size", "128"])
    assert found.output == (
        f"{out}: 2 tensors, dequantised weights identical bit for bit (checked 2 of 2), 3 kept, 0.1 MB as gptq, "
        "groups of 128\n"
    )
    found = run(command, [str(tmp_path / "i4"), str(out) + "2", "--to", "awq"])
    assert "identical bit for bit, -0 as 0 (checked 2 of 2)" in found.output
    found = run(command, [str(tmp_path / "i4"), str(out) + "3", "--to", "awq", "--json"])
    assert json.loads(found.output)["signed_zeros"] is False


BOOKS = SHARED / "models" / "books-llama-17m"


@pytest.mark.parametrize(
    ("source", "group_size", "split"), [(EXAMPLE, 256, 128), (EXAMPLE, -1, None), (BOOKS, 256, 128)]
)
def test_transformers_gives_the_same_logits(source: Path, group_size: int, split: int | None, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    if not source.exists():
        pytest.skip(f"{source.name} is not here")
    transformers = pytest.importorskip("transformers")
    manifest = convert_folder(source, tmp_path / "i4", Scheme(group_size), method="search")
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", "compressed-tensors", split)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    expected = load(source, dtype=torch.float32)
    for name, weight in weights(tmp_path / "i4", manifest).items():
        expected.get_parameter(name).data = weight
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_library_decompresses_to_the_same_weights(symmetric: bool, group_size: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    source = checkpoint(tmp_path, Scheme(group_size, symmetric), rows=20)
    export(source, tmp_path / "out", "compressed-tensors")
    config = QuantizationConfig.model_validate(settings(tmp_path / "out"))
    tensors = exported(tmp_path / "out")
    for name, expected in weights(tmp_path / "i4", source.manifest, torch.bfloat16).items():
        module = name.removesuffix("weight")
        parts = {full.removeprefix(module): tensor for full, tensor in tensors.items() if full.startswith(module)}
        found = PackedQuantizationCompressor.decompress(parts, config.config_groups["group_0"])
        assert torch.equal(found["weight"], expected)  # which the library rounds to the type of the scales
