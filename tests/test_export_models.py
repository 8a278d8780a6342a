"""Exports of models with other names in transformers, or a head without a tensor, loaded by compressed-tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import add_to_config, convert_folder
from safetensors.torch import load_file, save_file
from test_export import weights
from torch import Tensor

from converter.export import export
from formats.checkpoint import Checkpoint
from formats.layout import Scheme

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
BERT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
WHISPER = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
IDS = torch.arange(3, 23).unsqueeze(0)
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {  # model, configuration, its fields, input
    "another name in front": (
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"text_config": TEXT | ROPE, "vision_config": {
            "depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}},
        {"input_ids": IDS}),
    "names that lack a part, a tied head": (
        "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
        {"text_config": TEXT | {"model_type": "gemma"}, "projection_dim": 64,
         "vision_config": VISION | {"model_type": "siglip_vision_model"}},
        {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)}),
    "a head of another name": (
        "Mistral3ForConditionalGeneration", "Mistral3Config",
        {"text_config": TEXT | {"model_type": "mistral"},
         "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16}},
        {"input_ids": IDS}),
    "a router of another name": (
        "PhimoeForCausalLM", "PhimoeConfig", {**TEXT, "num_local_experts": 4}, {"input_ids": IDS}),
    "a linear layer that is called an embedding": (
        "Lfm2VlForConditionalGeneration", "Lfm2VlConfig",
        {"text_config": TEXT | {
            "model_type": "lfm2", "block_multiple_of": 32, "layer_types": ["full_attention", "conv"]},
         "vision_config": VISION | {"model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4},
         "projector_hidden_size": 64},
        {"input_ids": IDS}),
    "a tied head, proj_out": (
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER,
        {"input_features": torch.ones(1, 80, 3000, dtype=torch.bfloat16), "decoder_input_ids": IDS}),
    "a tied head, cls.predictions.decoder": ("BertForMaskedLM", "BertConfig", BERT, {"input_ids": IDS}),
    "a tied head, lm_head.decoder": (
        "RobertaForMaskedLM", "RobertaConfig", {**BERT, "pad_token_id": 0}, {"input_ids": IDS}),
}  # fmt: skip


def compare(cls: Any, folder: Path, inputs: dict[str, Tensor], include: tuple[str, ...] = ()) -> None:
    """The model that `cls` loads from an export of the source in `folder` is what the codec makes of that."""
    manifest = convert_folder(folder / "source", folder / "i4", Scheme(32), include=include)
    export(Checkpoint(folder / "i4"), folder / "out", "compressed-tensors")
    tensors = load_file(folder / "source" / "model.safetensors")
    tensors |= weights(folder / "i4", manifest, torch.bfloat16)
    save_file(tensors, folder / "source" / "model.safetensors", metadata={"format": "pt"})
    model, info = cls.from_pretrained(folder / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    expected = cls.from_pretrained(folder / "source", dtype=torch.bfloat16)
    found = model.state_dict()
    kept = [name for name in expected.state_dict() if f"{name}_packed" not in found]
    assert all(torch.equal(found[name], expected.state_dict()[name]) for name in kept)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_what_is_kept_under_its_own_names(kind: str, tmp_path: Path) -> None:
    model, config, fields, inputs = MODELS[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, model)
    cls(getattr(transformers, config)(**fields)).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    compare(cls, tmp_path, inputs)


def test_transformers_loads_a_head_in_int4_beside_an_embedding_that_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    add_to_config(tmp_path / "source", tie_word_embeddings=True)  # though the head has a tensor of its own
    compare(type(model), tmp_path, {"input_ids": IDS}, include=("lm_head",))
