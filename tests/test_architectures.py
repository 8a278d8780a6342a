"""Small random models of real architectures, as transformers saves them: converted, loaded, compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import add_to_config, convert_folder, stored
from safetensors.torch import load_file, save_file
from test_fp8 import FP8, in_fp8
from torch import Tensor

import runtime
from formats import codec
from formats.errors import CheckpointError
from formats.layout import Scheme
from formats.manifest import Manifest

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
MOE = {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 48,
       "num_experts_per_tok": 2}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
DEEPSEEK = {
    **SIZES, "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
ZAMBA = {
    **SIZES, "intermediate_size": 96, "attention_hidden_size": 128, "attention_head_dim": 32, "num_hidden_layers": 4,
    "num_key_value_heads": 4, "mamba_dt_rank": 8, "layers_block_type": ["mamba", "hybrid"] * 2,
    "use_mamba_kernels": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # configuration, its fields, matrices that become int4
    "Llama": ("LlamaConfig", GROUPED, 14),
    "Llama, tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, 14),
    "Qwen2, biases": ("Qwen2Config", GROUPED, 14),
    "Qwen3, norms of heads": ("Qwen3Config", {**GROUPED, "head_dim": 16}, 14),
    "Phi3, fused qkv and gate-up": ("Phi3Config", {**GROUPED, "pad_token_id": 0}, 8),
    "Falcon, fused qkv": ("FalconConfig", SIZES, 8),
    "Gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16}, 14),
    "Phi": ("PhiConfig", {**SIZES, "intermediate_size": 96}, 12),
    "OPT": ("OPTConfig", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}, 12),
    "GPT-OSS, fused experts, interleaved": ("GptOssConfig", {**GROUPED, "head_dim": 16, "num_local_experts": 4}, 12),
    "Llama4, fused experts": (
        "Llama4TextConfig", {**GROUPED, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96}, 18),
    "GPT-2, matrices stored [in, out]": ("GPT2Config", GPT2, 8),
    "GPT-NeoX, a head of another name": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 96}, 8),
    "Mixtral, experts one by one": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}, 8 + 2 * 4 * 3),
    "Qwen3-MoE, experts one by one": ("Qwen3MoeConfig", MOE, 8 + 2 * 4 * 3),
    "DeepSeek-V3, a shared expert": ("DeepseekV3Config", DEEPSEEK, 2 * 5 + 3 + 4 * 3 + 3),
    "Zamba, layers that are one": ("ZambaConfig", ZAMBA, 17),
}  # fmt: skip
DEEPSEEK_V4 = {
    **SIZES, "moe_intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16, "q_lora_rank": 32, "o_lora_rank": 32,
    "num_experts_per_tok": 2, "n_routed_experts": 4, "index_n_heads": 2, "index_head_dim": 16, "qk_rope_head_dim": 2,
    "layer_types": ["heavily_compressed_attention"], "mlp_layer_types": ["moe"], "sliding_window": 16,
}  # fmt: skip
TRANSPOSED: dict[str, tuple[str, dict[str, Any], str]] = {  # configuration, its fields, why what is turned becomes int4
    "GPT-2": ("GPT2Config", GPT2, "Conv1D, stored [in, out]"),
    "GPT-OSS": ("GptOssConfig", MOE, "fused experts, stored [in, out]"),
    "GPT-OSS of one size": (
        "GptOssConfig", {**MOE, "intermediate_size": 64}, "fused experts, stored [in, out]"),
    "Llama4": ("Llama4TextConfig", {**MOE, "intermediate_size_mlp": 96}, "fused experts, stored [in, out]"),
}  # fmt: skip
IDS = torch.arange(20).unsqueeze(0)
SCHEME = Scheme(32)


def random_model(config: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    found = getattr(transformers, config)(**fields)
    return transformers.AutoModelForCausalLM.from_config(found, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def dequantized(model: Any, manifest: Manifest, scale_dtype: torch.dtype = torch.bfloat16) -> Any:
    """`model` with the values that the codec gives its quantised matrices, also where it fuses experts."""
    rows = {row.name: row for row in manifest.tensors if row.quantized}
    fuses = not rows.keys() <= dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if name in rows or (fuses and parameter.dim() == 3):
            transposed = name in rows and rows[name].transposed
            weight = parameter.detach().mT if transposed else parameter.detach()
            quantized = codec.quantize(weight, SCHEME, scale_dtype)
            found = codec.dequantize(quantized, weight.shape[-1], SCHEME, weight.dtype)
            parameter.data = found.mT.contiguous() if transposed else found
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    config, fields, count = MODELS[name]
    model = random_model(config, fields)
    model.save_pretrained(tmp_path / "source")
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    assert manifest.sizes.quantized == count
    loaded = runtime.load(tmp_path / "out", device="cpu")
    plain = logits(model)
    found, expected = logits(loaded), logits(dequantized(model, manifest))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sources_of_16_bits_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model("LlamaConfig", GROUPED, dtype)
    model.save_pretrained(tmp_path / "source")
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    loaded = runtime.load(tmp_path / "out", device="cpu")
    assert loaded.dtype == dtype
    expected = logits(dequantized(model, manifest, dtype)).float()
    assert torch.allclose(logits(loaded).float(), expected, atol=0.02 * expected.abs().max().item())


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it(tmp_path: Path) -> None:
    model = random_model("Llama4TextConfig", {**MOE, "intermediate_size_mlp": 96})
    model.save_pretrained(tmp_path / "source")
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME, include=("*.router",))
    assert {row.quantized for row in manifest.tensors if "router" in row.name} == {True}
    loaded = runtime.load(tmp_path / "out", device="cpu")
    assert torch.allclose(logits(loaded), logits(dequantized(model, manifest)), rtol=1e-3, atol=1e-4)
    plain = loaded.dequantize().get_submodule("model.layers.0.feed_forward.router")
    assert type(plain).__name__ == "Llama4Router"
    assert torch.equal(plain.weight, model.get_submodule("model.layers.0.feed_forward.router").weight)


def test_what_a_model_makes_itself_need_not_be_in_the_checkpoint(tmp_path: Path) -> None:
    config = transformers.MarianConfig(
        vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=96, decoder_ffn_dim=96,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    model.save_pretrained(tmp_path / "source")
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    table = "model.encoder.embed_positions.weight"
    assert table not in {row.name for row in manifest.tensors}
    loaded = runtime.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.get_parameter(table), model.get_parameter(table))


def test_a_weight_that_transformers_renames_may_be_int4(tmp_path: Path) -> None:
    random_model("DeepseekV4Config", DEEPSEEK_V4).save_pretrained(tmp_path / "source")
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME, include=("head",))
    assert next(row.quantized for row in manifest.tensors if row.name == "head.weight")
    head = runtime.load(tmp_path / "out", device="cpu").lm_head
    assert isinstance(head, runtime.Int4Linear)
    assert torch.equal(head.weight_packed, stored(tmp_path / "out")["head.weight_packed"])


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_rows_that_share_words_of_zero_points_are_not_joined(kind: str, tmp_path: Path) -> None:
    fields = {**MOE, "intermediate_size": 44, "moe_intermediate_size": 44}
    random_model(f"{kind}Config", fields).save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "out", Scheme(32, symmetric=False))
    with pytest.raises(
        CheckpointError, match=r"has 44 rows with zero points, .*Concatenate.* --scheme sym or --exclude"
    ):
        runtime.load(tmp_path / "out", device="cpu")


def test_a_source_in_fp8_has_the_logits_of_what_it_means(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    model = random_model("Qwen3Config", {**GROUPED, "head_dim": 16}, torch.bfloat16)

    def encode(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj." in name]:
            tensors[name], tensors[f"{name}_scale_inv"], meant = in_fp8(tensors[name])
            model.get_parameter(name).data = meant

    model.save_pretrained(folder)
    edit(folder, encode)
    add_to_config(folder, quantization_config=FP8)
    manifest = convert_folder(folder, tmp_path / "out", SCHEME)
    assert manifest.sizes.quantized == 14
    expected = logits(dequantized(model, manifest)).float()
    found = logits(runtime.load(tmp_path / "out", device="cpu")).float()
    assert torch.allclose(found, expected, atol=0.02 * expected.abs().max().item())


def test_a_head_that_is_shipped_though_it_is_tied_is_used(tmp_path: Path) -> None:
    def untie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    folder = tmp_path / "source"
    model = random_model("LlamaConfig", {**GROUPED, "tie_word_embeddings": True})
    model.save_pretrained(folder)
    edit(folder, untie)
    manifest = convert_folder(folder, tmp_path / "out", SCHEME)
    loaded = runtime.load(tmp_path / "out", device="cpu")
    assert torch.allclose(logits(loaded), 2 * logits(dequantized(model, manifest)), rtol=1e-3, atol=1e-4)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_that_is_missing_and_not_tied_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    random_model("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    convert_folder(folder, tmp_path / "out", SCHEME)
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(lm_head\.weight\)"):
        runtime.load(tmp_path / "out", device="cpu")


def test_experts_that_are_stored_one_by_one_become_int4(tmp_path: Path) -> None:
    fields = {**GROUPED, "num_local_experts": 4}
    random_model("MixtralConfig", fields).save_pretrained(tmp_path / "source")
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    experts = [row for row in manifest.tensors if ".experts." in row.name]
    assert len(experts) == 2 * 4 * 3
    assert all(row.quantized for row in experts)
    assert [row.reason for row in manifest.tensors if row.name.endswith(".gate.weight")] == ["router"] * 2


@pytest.mark.parametrize("name", TRANSPOSED)
def test_matrices_that_a_model_stores_in_out_are_turned(name: str, tmp_path: Path) -> None:
    config, fields, reason = TRANSPOSED[name]
    model = random_model(config, fields)
    model.save_pretrained(tmp_path / "source")
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    turned = {row.name: row for row in manifest.tensors if row.transposed}
    held = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    expected = {f"{name}.weight" for name in held} or {
        f"{name}.{leaf}_proj"
        for name, _ in model.named_modules()
        if name.endswith(".experts")
        for leaf in ("gate_up", "down")
    }
    assert turned.keys() == expected
    assert {row.reason for row in turned.values()} == {reason}
    compare(tmp_path / "out", manifest, {name: model.get_parameter(name).mT for name in turned})


def test_experts_that_a_model_stores_out_in_stay_that_way_round(tmp_path: Path) -> None:
    """As the modules of transformers hold them, which other programs save as they are."""
    model = random_model("Qwen3MoeConfig", MOE)
    model.save_pretrained(tmp_path / "source")
    fused = {name: tensor.detach() for name, tensor in model.state_dict().items() if ".experts." in name}

    def fuse(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        tensors |= fused

    edit(tmp_path / "source", fuse)
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    rows = {row.name: row for row in manifest.tensors if row.reason == "fused experts"}
    assert rows.keys() == fused.keys()
    assert len(rows) == 2 * 2
    assert manifest.requires == ("stacks",)
    compare(tmp_path / "out", manifest, fused)


@torch.no_grad()
def compare(out: Path, manifest: Manifest, expected: dict[str, Tensor]) -> None:
    """What is stored in `out`, and the codec makes of it, must be `expected` up to the rounding to int4."""
    tensors, errors = stored(out), {row.name: row.error for row in manifest.tensors}
    for name, weight in expected.items():
        scale = tensors[f"{name}_scale"]
        quantized = codec.Quantized(tensors[f"{name}_packed"], scale, tensors.get(f"{name}_zero_point"))
        values = codec.dequantize(quantized, weight.shape[-1], SCHEME)
        assert values.shape == weight.shape
        steps = scale.float().abs().repeat_interleave(SCHEME.group_size, -1)[..., : weight.shape[-1]]
        assert ((values - weight).abs() <= (0.5 + 7 * 2**-8) * steps).all()
        error = errors[name]
        assert error is not None
        relative = float((values - weight).square().sum() / weight.square().sum())
        assert error.relative_mse == pytest.approx(relative, rel=1e-4)
        assert relative < 0.01


def test_a_model_that_sees_keeps_its_vision(tmp_path: Path) -> None:
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**GROUPED)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "source")
    manifest = convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    assert manifest.sizes.quantized == 14
    assert not any(row.quantized for row in manifest.tensors if "language_model" not in row.name)
    seen = {
        "input_ids": torch.tensor([[1, 2, *[63] * 4, 3, 4]]),  # an image has four patches
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    }
    for name, parameter in model.named_parameters():
        if "language_model" in name and "_proj." in name:
            quantized = codec.quantize(parameter.detach(), SCHEME, torch.bfloat16)
            parameter.data = codec.dequantize(quantized, parameter.shape[1], SCHEME)
    with torch.no_grad():
        expected, found = model(**seen).logits, runtime.load(tmp_path / "out", device="cpu")(**seen).logits
    assert torch.allclose(found, expected, atol=1e-4)
