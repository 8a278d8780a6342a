"""Exports of fused experts and of Conv1D: each expert under the name that other programs look for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import add_to_config, convert_folder, random, write_checkpoint
from safetensors.torch import load_file, save_file
from test_architectures import GPT2, GROUPED, IDS, MOE, random_model
from test_export import by_awq, by_gptq, by_mlx, exported, kept_as, parts_of, weights
from torch import Tensor

from converter.expert_names import ARCHITECTURES
from converter.export import export
from formats.checkpoint import Checkpoint
from formats.codec import Quantized, dequantize, quantize
from formats.errors import CheckpointError
from formats.interop import LAYOUTS
from formats.interop.groups import cut
from formats.interop.proof import prove
from formats.layout import Scheme
from formats.manifest import Manifest

transformers = pytest.importorskip("transformers")

BLOCK = "model.layers.0.mlp"
INNER, HIDDEN, COUNT = 24, 64, 3
DECODERS = {
    ("gptq", True): lambda parts: by_gptq(parts, 1),
    ("gptq", False): lambda parts: by_gptq(parts, 0),
    ("awq", True): by_awq,
    ("awq", False): by_awq,
}


def fused(
    folder: Path, model_type: str, scheme: Scheme, *, turned: bool = False, inner: int = INNER
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A converted checkpoint of stacks and a gate, and its weights; `turned`: the source has them [in, out]."""
    stacks = {
        f"{BLOCK}.experts.gate_up_proj": random(COUNT, 2 * inner, HIDDEN, seed=1),
        f"{BLOCK}.experts.down_proj": random(COUNT, HIDDEN, inner, seed=2),
    }
    tensors = {name: stack.mT.contiguous() if turned else stack for name, stack in stacks.items()}
    tensors |= {f"{BLOCK}.gate.weight": random(COUNT, HIDDEN, seed=3)}
    sizes = {"model_type": model_type, "hidden_size": HIDDEN, "moe_intermediate_size": inner}
    convert_folder(write_checkpoint(folder / "source", tensors, config=sizes), folder / "i4", scheme, method="search")
    found = Checkpoint(folder / "i4")
    return found, weights(folder / "i4", found.manifest)


def one_by_one(found: dict[str, Tensor], inner: int = INNER) -> dict[str, Tensor]:
    """What each linear layer of each expert should be, by its place in the stacks."""
    expected: dict[str, Tensor] = {}
    for e in range(COUNT):
        gate_up = found[f"{BLOCK}.experts.gate_up_proj"][e]
        expected[f"{BLOCK}.experts.{e}.gate_proj.weight"] = gate_up[:inner]
        expected[f"{BLOCK}.experts.{e}.up_proj.weight"] = gate_up[inner:]
        expected[f"{BLOCK}.experts.{e}.down_proj.weight"] = found[f"{BLOCK}.experts.down_proj"][e]
    return expected


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("to", "symmetric"), DECODERS)
def test_another_decoder_reads_every_expert(to: str, symmetric: bool, turned: bool, tmp_path: Path) -> None:
    source, found = fused(tmp_path, "qwen3_moe", Scheme(8, symmetric), turned=turned)
    export(source, tmp_path / "out", to)
    tensors = exported(tmp_path / "out")
    expected = one_by_one(found)
    for name, weight in expected.items():
        assert (DECODERS[to, symmetric](parts_of(tensors, name)) == weight.numpy()).all()
    modules = {name.rpartition(".")[0] for name in tensors}
    assert modules == {name.removesuffix(".weight") for name in expected} | {f"{BLOCK}.gate"}


@pytest.mark.parametrize("inner", [24, 13])  # 13: the words of zero points are cut
def test_cut_rows_keep_their_zero_points(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("formats.interop.proof.BLOCK_WEIGHTS", 1)  # so that it goes by eight rows at a time
    scheme = Scheme(8, symmetric=False)
    layout = LAYOUTS["compressed-tensors"].for_export(scheme)
    stack = quantize(random(COUNT, 2 * inner, HIDDEN), scheme, torch.bfloat16)
    whole = dequantize(stack, HIDDEN, scheme)
    for e in range(COUNT):
        for rows in (range(inner), range(inner, 2 * inner)):
            one = stack.matrix(e)
            parts = layout.relayout(cut(one, rows), HIDDEN)
            assert torch.equal(layout.decode(parts, slice(0, inner)), whole[e][rows.start : rows.stop])
            assert prove(layout, parts, one, HIDDEN, scheme, rows)


def test_the_proof_is_of_the_rows_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = fused(tmp_path, "qwen3_moe", Scheme(8))

    def first(matrix: Quantized, rows: range) -> Quantized:
        return cut(matrix, range(len(rows)))

    monkeypatch.setattr("converter.pieces.cut", first)
    with pytest.raises(CheckpointError, match=r"'model.*gate_up_proj': \d+ weights differ in gptq"):
        export(source, tmp_path / "out", "gptq")


def test_mlx_has_them_stacked(tmp_path: Path) -> None:
    source, found = fused(tmp_path, "mixtral", Scheme(32), inner=32)
    export(source, tmp_path / "out", "mlx")
    tensors = exported(tmp_path / "out")
    block = "model.layers.0.block_sparse_moe"
    layers = {f"{block}.switch_mlp.{leaf}_proj" for leaf in ("gate", "up", "down")}
    assert {name.rpartition(".")[0] for name in tensors} == layers | {f"{block}.gate"}
    for name, expected in one_by_one(found, inner=32).items():
        *_, index, leaf, _ = name.split(".")
        one = {full: tensor[int(index)] for full, tensor in tensors.items() if f".{leaf}." in full}
        assert (by_mlx(parts_of(one, f"{block}.switch_mlp.{leaf}.weight")) == expected.numpy()).all()


@pytest.mark.parametrize(
    ("to", "model_type", "symmetric", "message"),
    [
        (
            "compressed-tensors",
            "gpt_oss",
            True,
            "a stack of experts, and for model type gpt_oss .*no target can: .*--excl",
        ),
        ("gptq", "new", True, "a stack of experts, and for model type new no program"),
        (
            "mlx",
            "qwen3_next",
            True,
            "a stack of experts, and for model type qwen3_next no program .*; compressed-tensors, gptq, awq can",
        ),
        ("compressed-tensors", "qwen3_moe", False, "experts with zero points, .*; gptq, awq"),
    ],
)
def test_stacks_that_nothing_reads_are_refused(
    to: str, model_type: str, symmetric: bool, message: str, tmp_path: Path
) -> None:
    source, _ = fused(tmp_path, model_type, Scheme(8, symmetric))
    with pytest.raises(
        CheckpointError, match=rf"'model\.layers\.0\.mlp\.experts\.\w+': {to} cannot hold it: {message}"
    ):
        export(source, tmp_path / "out", to)


def test_halves_that_a_target_cannot_hold_are_refused(tmp_path: Path) -> None:
    source, _ = fused(tmp_path, "qwen3_moe", Scheme(8), inner=20)  # 40 rows, but 20 of each
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj': awq cannot hold it: 20 rows are no multiple of 8; compr"
    ):
        export(source, tmp_path / "out", "awq")


@pytest.mark.parametrize("to", [name for name in LAYOUTS if name != "gptq"])
def test_a_conv1d_is_refused_where_nothing_takes_it(to: str, tmp_path: Path) -> None:
    tensors = {"h.0.attn.c_attn.weight": random(32, 64)}
    source = write_checkpoint(tmp_path / "source", tensors, shards=1, config={"model_type": "gpt2"})
    convert_folder(source, tmp_path / "i4", Scheme(32))
    with pytest.raises(CheckpointError, match=r"c_attn\.weight': .* a Conv1D, where .* linear layers only; gptq can"):
        export(Checkpoint(tmp_path / "i4"), tmp_path / "out", to)


def test_a_conv1d_as_gptq_is_the_linear_layer_that_it_is(tmp_path: Path) -> None:
    random_model("GPT2Config", GPT2).save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "i4", Scheme(32))
    source = Checkpoint(tmp_path / "i4")
    export(source, tmp_path / "out", "gptq")
    tensors = exported(tmp_path / "out")
    for name, weight in weights(tmp_path / "i4", source.manifest).items():
        assert (
            by_gptq(parts_of({n: t for n, t in tensors.items() if not n.endswith(".bias")}, name), 1) == weight.numpy()
        ).all()


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "llama4_text": (
        "Llama4TextConfig",
        {**GROUPED, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96},
    ),
}
ROUTERS = {
    "qwen2_moe": ("mlp.gate", "mlp.shared_expert_gate"),
    "qwen3_moe": ("mlp.gate",),
    "mixtral": ("block_sparse_moe.gate",),
    "llama4_text": ("feed_forward.router",),
}


def saved(model_type: str, folder: Path, *, as_published: bool) -> Manifest:
    """A random model, converted from experts one by one or from fused ones."""
    model = random_model(*MODELS[model_type], dtype=torch.bfloat16)
    model.save_pretrained(folder / "source", save_original_format=as_published)
    return convert_folder(folder / "source", folder / "i4", Scheme(16), method="search")


@pytest.mark.parametrize("as_published", [True, False])
@pytest.mark.parametrize("model_type", MODELS)
def test_names_are_those_that_the_architecture_publishes(model_type: str, as_published: bool, tmp_path: Path) -> None:
    saved(model_type, tmp_path, as_published=as_published)
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", "compressed-tensors")
    found = {name.replace("weight_packed", "weight") for name in exported(tmp_path / "out")}
    found = {name for name in found if not name.endswith(("weight_scale", "weight_shape"))}
    if model_type != "llama4_text":  # published fused
        random_model(*MODELS[model_type]).save_pretrained(tmp_path / "published")
        assert found == set(load_file(tmp_path / "published" / "model.safetensors"))
    routers = {f"model.layers.{i}.{name}" for i in range(2) for name in ROUTERS[model_type]}
    modules = {name.removesuffix(".weight") for name in found}
    for to in ("compressed-tensors", "gptq", "awq"):
        if to != "compressed-tensors":
            export(Checkpoint(tmp_path / "i4"), tmp_path / to, to)
        is_kept = kept_as(to, tmp_path / ("out" if to == "compressed-tensors" else to))
        assert set(filter(is_kept, modules)) == {"lm_head", "model.embed_tokens", *routers}


def test_the_table_agrees_with_transformers() -> None:
    mapping = pytest.importorskip("transformers.conversion_mapping").get_checkpoint_conversion_mapping
    elsewhere = {"gemma4", "gemma4_text", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_5_moe"}
    for model_type, experts in ARCHITECTURES.items():
        if model_type not in elsewhere:
            sources = [str(name) for rule in mapping(model_type) for name in rule.source_patterns]
            for leaf in experts.leaves:
                assert any(name.endswith(f"experts.*.{leaf}.weight") for name in sources), model_type


@pytest.mark.parametrize("as_published", [True, False])
@pytest.mark.parametrize("model_type", MODELS)
def test_transformers_gives_the_same_logits(model_type: str, as_published: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    manifest = saved(model_type, tmp_path, as_published=as_published)
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", "compressed-tensors")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    values = weights(tmp_path / "i4", manifest, torch.bfloat16)
    for row in manifest.tensors:
        if row.quantized:
            tensors[row.name] = (values[row.name].mT if row.transposed else values[row.name]).contiguous()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load(tmp_path / "source", dtype=torch.bfloat16)(IDS).logits)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_mlx_lm_gives_the_same_logits(model_type: str, tmp_path: Path) -> None:
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    name, fields = MODELS[model_type]
    model = random_model(
        name, {**fields, "moe_intermediate_size": 64, "intermediate_size": 64, "shared_expert_intermediate_size": 64}
    )
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    theta = model.config.rope_parameters["rope_theta"]
    add_to_config(
        tmp_path / "source", rope_theta=theta, num_experts=4, mlp_only_layers=[]
    )  # as published configurations have it
    manifest = convert_folder(tmp_path / "source", tmp_path / "i4", Scheme(32))
    export(Checkpoint(tmp_path / "i4"), tmp_path / "out", "mlx")
    found, _ = utils.load_model(tmp_path / "out")
    found.set_dtype(mx.float32)
    for row_name, weight in weights(tmp_path / "i4", manifest).items():
        model.get_parameter(row_name).data = weight
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(found(mx.array(IDS.tolist())).tolist()), model(IDS).logits, rtol=0, atol=1e-5
        )


def test_int4_experts_that_mlx_lm_would_not_stack_are_refused(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path, as_published=True)
    with pytest.raises(CheckpointError, match=r"mlx cannot hold it: experts one by one, .* qwen3_moe; compressed-t"):
        export(Checkpoint(tmp_path / "i4"), tmp_path / "out", "mlx", 8)


def test_zero_points_of_experts_one_by_one_are_refused(tmp_path: Path) -> None:
    random_model(*MODELS["mixtral"]).save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "i4", Scheme(16, symmetric=False))
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.w\d\.weight': .* experts with zero points, .*; gptq, awq can"
    ):
        export(Checkpoint(tmp_path / "i4"), tmp_path / "out", "compressed-tensors")
