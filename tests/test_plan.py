from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random, write_checkpoint

from converter.convert import make_recipe
from converter.plan import Plan, make_plan
from converter.source import open_source
from formats.errors import CheckpointError, UsageError
from formats.layout import Scheme, TensorSpec
from formats.selection import kept_by_default, never_quantized


def plan_of(folder: Path, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Plan:
    return make_plan(open_source(str(folder)), make_recipe(Scheme(8), "absmax", include, exclude))


def quantized(plan: Plan) -> set[str]:
    return {tensor.name for tensor in plan.tensors if tensor.quantized}


OTHER_EXPERTS = "experts in a layout that is not known"
LINEARS = {"model.layers.0.q_proj.weight", "model.layers.0.down_proj.weight"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lm_head.weight", "output head"),
        ("model.language_model.lm_head.weight", "output head"),
        ("output.weight", "output head"),
        ("head.weight", "output head"),
        ("proj_out.weight", "output head"),
        ("mlm_head.weight", "output head"),
        ("vocab_projector.weight", "output head"),
        ("cls.predictions.decoder.weight", "output head"),
        ("generator_predictions.decoder.weight", "output head"),
        ("lm_head.decoder.weight", "output head"),
        ("head.decoder.weight", "output head"),
        ("generator_lm_head.weight", "output head"),
        ("decoder.weight", "output head"),
        ("cls.weight", "output head"),
        ("logits_dense.weight", "output head"),
        ("log_softmax.mlp.layer0.weight", "output head"),
        ("output_projection.weight", "output head"),
        ("model.decoder.output_projection.weight", "output head"),
        ("model.llm.unembed.weight", "output head"),
        ("embed_out.weight", "output head"),
        ("score.weight", "output head"),
        ("classifier.weight", "output head"),
        ("qa_outputs.weight", "output head"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.block_sparse_moe.gate.weight", "router"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "router"),
        ("model.layers.3.mlp.router.weight", "router"),
        ("model.layers.3.block_sparse_moe.router.layer.weight", "router"),
        ("model.layers.3.mlp.router.classifier.weight", "router"),
        ("model.layers.3.mlp.gate.wg.weight", "router"),
        ("model.layers.3.mlp.gate.down_proj.weight", "router"),
        ("model.layers.3.mlp.gate.router_mlp.fc1.weight", "router"),
        ("model.layers.3.mlp.router_gate.weight", "router"),
        ("model.layers.3.altup.modality_router.weight", "router"),
        ("model.layers.3.input_layernorm.weight", "norm"),
        ("h.0.ln_1.weight", "norm"),
        ("h.0.norm2.weight", "norm"),
        ("h.0.layer_norm_1.weight", "norm"),
        ("encoder.LayerNorm.weight", "norm"),
        ("model.layers.3.input_layernorm.W_down.weight", "norm"),
        ("model.layers.3.post_attention_layernorm.mlp.fc1.weight", "norm"),
        ("model.vision_tower.layers.0.q_proj.weight", "vision or audio part"),
        ("visual.blocks.0.attn.qkv.weight", "vision or audio part"),
        ("git.visual_projection.visual_projection.0.weight", "vision or audio part"),
        ("model.sam_model.blocks.0.attn.qkv.weight", "vision or audio part"),
        ("qformer.encoder.layer.0.output_query.dense.weight", "vision or audio part"),
        ("model.projector.linear_fc1.weight", "vision or audio part"),
        ("vit_large_projector.weight", "vision or audio part"),
        ("patch_merger.merging_layer.weight", "vision or audio part"),
        ("deepstack_merger_list.0.linear_fc1.weight", "vision or audio part"),
        ("model.aligner.linear1.weight", "vision or audio part"),
        ("model.connector.modality_projection.proj.weight", "vision or audio part"),
        ("model.layers.3.norm_proj.weight", None),
        ("model.layers.3.head.weight", None),
        ("blocks.3.proj_out.weight", None),
        ("model.layers.3.output_projection.weight", None),
        ("model.layers.3.decoder.weight", None),
        ("model.decoder.layers.3.fc1.weight", None),
        ("head.dense.weight", None),
        ("lm_head.dense.weight", None),
        ("model.altup_unembed_projections.0.weight", None),
        ("model.layers.3.self_attn.forget_gate.f_a_proj.weight", None),
        ("model.layers.3.self_attn.output_gate.weight", None),
        ("model.layers.3.mlp.linear_gate.weight", None),
        ("roberta_prelayernorm.encoder.layer.3.output.dense.weight", None),
        ("transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight", None),
        ("visual_bert.encoder.layer.3.output.dense.weight", None),
        ("model.layers.3.mlp.gate_proj.weight", None),
        ("model.layers.3.self_attn.o_proj.weight", None),
        ("model.layers.3.attention.output.dense.weight", None),
        ("model.layers.3.mlp.experts.7.w1.weight", None),
        ("transformer.h.3.mlp.dense_4h_to_h.weight", None),
    ],
)
def test_names_that_are_kept_by_default(name: str, reason: str | None) -> None:
    assert kept_by_default(name) == reason


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("model.embed_tokens.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("gpt_neox.embed_in.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("transformer.wte.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("transformer.wpe.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("shared.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("a.relative_attention_bias.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("model.embed_tokens_per_layer.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("token_embd.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("rwkv.emb.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("quantizer.codebook.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("model.embed_tokens_proj.weight", TensorSpec("BF16", (8, 8)), None),
        ("backbone.embeddings.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("transformer.w.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("text_model.model.segment_emb.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("encoder.layers.0.attn.rel_pos_emb.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("model.visual_embeddings_table.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("encoder.embeddings.row_embedder.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("encoder.embeddings.column_embedder.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("model.encoder.embed_global.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("wrapped_encoder.embed_positions.pe_k.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("tapas.embeddings.token_type_embeddings_0.weight", TensorSpec("BF16", (8, 8)), "embedding"),
        ("model.llm.unembed.weight", TensorSpec("BF16", (8, 8)), None),
        ("transformer.h.0.w.weight", TensorSpec("BF16", (8, 8)), None),
        ("luke.entity_embeddings.entity_embedding_dense.weight", TensorSpec("BF16", (8, 8)), None),
        ("albert.encoder.embedding_hidden_mapping_in.weight", TensorSpec("BF16", (8, 8)), None),
        ("a.q_proj.bias", TensorSpec("BF16", (8,)), "bias"),
        ("a.norm.weight", TensorSpec("BF16", (8,)), "1-D"),
        ("a.conv1d.weight", TensorSpec("BF16", (8, 1, 4)), "3-D"),
        ("a.A_log", TensorSpec("BF16", (8, 8)), "not named .weight"),
        ("a.moe.input_linear.weight", TensorSpec("BF16", (2, 8, 8)), OTHER_EXPERTS),
        ("a.mlp.output_linear.weight", TensorSpec("BF16", (2, 8, 8)), OTHER_EXPERTS),
        ("a.mlp.output_linear.weight", TensorSpec("BF16", (8, 8)), None),
        ("a.experts.fc1.weight", TensorSpec("BF16", (2, 8, 8)), OTHER_EXPERTS),
        ("a.experts.w13_weight", TensorSpec("BF16", (2, 8, 8)), OTHER_EXPERTS),
        ("a.experts.mlp.w1", TensorSpec("BF16", (16, 8)), OTHER_EXPERTS),
        ("a.experts.gate_up_proj", TensorSpec("BF16", (16, 8)), OTHER_EXPERTS),
        ("a.experts.0.w1.weight", TensorSpec("BF16", (16, 8)), None),
        ("a.experts.gate_up_proj_bias", TensorSpec("BF16", (2, 8)), "not named .weight"),
        ("a.experts.gate_up_proj", TensorSpec("I8", (2, 16, 8)), "type I8"),
        ("a.experts.gate_up_proj", TensorSpec("F32", (0, 16, 8)), "empty"),
        ("a.gate_up_proj", TensorSpec("BF16", (2, 16, 8)), "3-D"),
        ("a.experts.gate_up_proj", TensorSpec("BF16", (2, 16, 8)), None),
        ("a.shared_experts.up_proj", TensorSpec("F16", (2, 16, 8)), None),
        ("a.ids.weight", TensorSpec("I64", (8, 8)), "type I64"),
        ("a.q_proj.weight", TensorSpec("BF16", (0, 8)), "empty"),
        ("a.q_proj.weight", TensorSpec("F32", (8, 8)), None),
        ("a.patch_embed.proj.weight", TensorSpec("BF16", (8, 8)), None),
    ],
)
def test_tensors_that_no_option_quantises(name: str, spec: TensorSpec, reason: str | None) -> None:
    assert never_quantized(name, spec) == reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2"}, "Conv1D, stored [in, out]"),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, "Conv1D, stored [in, out]"),
        ({"model_type": "gpt_bigcode"}, "linear layer"),
    ],
)
def test_the_type_of_the_model_tells_what_is_a_conv1d(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    tensors = {"h.0.attn.c_attn.weight": random(16, 24), "other.weight": random(8, 16)}
    found, other = plan_of(write_checkpoint(tmp_path / "source", tensors, shards=1, config=config)).tensors
    assert (found.reason, other.reason) == (reason, "linear layer")
    assert found.transposed == ("Conv1D" in reason)
    assert not other.transposed
    shape = (24, 2) if found.transposed else (16, 3)
    assert found.stored["h.0.attn.c_attn.weight_packed"] == TensorSpec("I32", shape)


EXPERTS = "model.layers.0.mlp.experts."
SIZES = {"hidden_size": 24, "moe_intermediate_size": 16}
SQUARE = {"hidden_size": 16, "moe_intermediate_size": 16}
PLAIN, TURNED, UNKNOWN = "fused experts", "fused experts, stored [in, out]", "neither shapes nor config.json tell"


@pytest.mark.parametrize(
    ("shapes", "config", "reason"),
    [
        # gate_up_proj beside down_proj leaves one way round, whatever config.json says or does not
        ({"gate_up_proj": (32, 24), "down_proj": (24, 16)}, {}, PLAIN),
        ({"gate_up_proj": (24, 32), "down_proj": (16, 24)}, {}, TURNED),
        ({"gate_up_proj": (32, 16), "down_proj": (16, 16)}, SQUARE, PLAIN),
        ({"gate_up_proj": (16, 32), "down_proj": (16, 16)}, SQUARE, TURNED),
        ({"gate_up_proj": (32, 32), "down_proj": (32, 16)}, {}, PLAIN),
        ({"gate_up_proj": (32, 32), "down_proj": (16, 32)}, {}, TURNED),
        ({"gate_up_proj": (32, 24), "down_proj": (16, 24)}, SIZES, UNKNOWN),  # one this way, one that
        # without one of the two, the sizes of config.json
        ({"gate_up_proj": (32, 24)}, SIZES, PLAIN),
        ({"gate_up_proj": (24, 32)}, SIZES, TURNED),
        ({"down_proj": (24, 16)}, {"text_config": {"hidden_size": 24, "intermediate_size": 16}}, PLAIN),
        ({"down_proj": (16, 24)}, {"text_config": {"hidden_size": 24, "intermediate_size": 16}}, TURNED),
        ({"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}, SIZES, PLAIN),
        ({"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}, SIZES, TURNED),
        ({"up_proj": (16, 8), "down_proj": (8, 16)}, {**SIZES, "moe_latent_size": 8}, PLAIN),
        ({"gate_up_proj": (32, 32)}, {"hidden_size": 32, "moe_intermediate_size": 16}, UNKNOWN),
        ({"gate_proj": (16, 16), "up_proj": (16, 16), "down_proj": (16, 16)}, SQUARE, UNKNOWN),
        ({"up_proj": (16, 24), "down_proj": (24, 16)}, {}, UNKNOWN),
        ({"up_proj": (16, 24), "down_proj": (24, 16)}, {"hidden_size": "24", "intermediate_size": True}, UNKNOWN),
        # the sizes of two parts of a model are not mixed
        ({"up_proj": (16, 24)}, {"a": {"hidden_size": 24}, "b": {"intermediate_size": 16}}, UNKNOWN),
    ],
)
def test_shapes_and_sizes_tell_which_way_round_experts_are_stored(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], config: dict[str, Any], reason: str
) -> None:
    tensors = {EXPERTS + leaf: random(3, *shape) for leaf, shape in shapes.items()} | {"a.weight": random(8, 8)}
    plan = plan_of(write_checkpoint(tmp_path / "source", tensors, config=config))
    stacks = [tensor for tensor in plan.tensors if tensor.name.startswith(EXPERTS)]
    assert len(stacks) == len(shapes)
    for tensor in stacks:
        assert tensor.quantized == (reason != UNKNOWN)
        assert tensor.transposed == (reason == TURNED)
        assert tensor.reason.endswith(reason) if reason == UNKNOWN else tensor.reason == reason
        _, rows, columns = tensor.spec.shape
        if reason == UNKNOWN:
            assert tensor.stored == {tensor.name: tensor.spec}
        else:
            shape = (3, columns, rows // 8) if reason == TURNED else (3, rows, columns // 8)
            assert tensor.stored[f"{tensor.name}_packed"] == TensorSpec("I32", shape)


def test_patterns_work_on_experts_as_on_others(tmp_path: Path) -> None:
    tensors = {
        f"layers.{i}.experts.{leaf}": random(2, 16, 8) for i in range(2) for leaf in ("gate_up_proj", "down_proj")
    }
    tensors |= {name: random(2, 8, 8) for name in tensors if name.endswith("down_proj")}
    folder = write_checkpoint(tmp_path / "source", tensors, shards=1)
    assert quantized(plan_of(folder, exclude=("layers.0.experts.*",))) == {
        "layers.1.experts.gate_up_proj", "layers.1.experts.down_proj",
    }  # fmt: skip
    plan = plan_of(folder, include=("*.gate_up_proj",), exclude=("re:down_proj$",))
    assert {tensor.reason for tensor in plan.tensors} == {"included by *.gate_up_proj", "excluded by re:down_proj$"}


def test_a_plan_that_quantises_nothing_says_why(tmp_path: Path) -> None:
    tensors = {f"h.{i}.experts.up_proj": random(2, 8, 8) for i in range(3)} | {"wte.weight": random(8, 8)}
    folder = write_checkpoint(tmp_path / "source", tensors, shards=1)
    with pytest.raises(CheckpointError, match=r"nothing to quantise: 3 × fused experts, stored .*, 1 × embedding"):
        plan_of(folder)


def test_linear_layers_are_quantised_and_every_other_tensor_has_a_reason(folder: Path) -> None:
    plan = plan_of(folder)
    assert quantized(plan) == LINEARS
    assert {tensor.name: tensor.reason for tensor in plan.tensors if not tensor.quantized} == {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.q_proj.bias": "bias",
        "model.norm.weight": "1-D",
        "lm_head.weight": "output head",
    }


@pytest.mark.parametrize("pattern", ["lm_head", "lm_head.weight", "lm_*", "re:^lm_head"])
def test_include_quantises_what_is_kept_by_default(folder: Path, pattern: str) -> None:
    assert quantized(plan_of(folder, include=(pattern,))) == LINEARS | {"lm_head.weight"}


@pytest.mark.parametrize("pattern", ["*.down_proj", "model.layers.0.down_proj.weight", "re:down"])
def test_exclude_keeps_and_says_by_which_pattern(folder: Path, pattern: str) -> None:
    plan = plan_of(folder, exclude=(pattern,))
    assert quantized(plan) == {"model.layers.0.q_proj.weight"}
    assert f"excluded by {pattern}" in {tensor.reason for tensor in plan.tensors}


def test_exclude_wins_over_include(folder: Path) -> None:
    assert quantized(plan_of(folder, include=("*",), exclude=("lm_*",))) == LINEARS


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(folder: Path, option: str) -> None:
    with pytest.raises(UsageError, match="'nothing.\\*': matches no tensor"):
        plan_of(folder, **{option: ("nothing.*",)})


def test_an_include_that_can_change_nothing_is_an_error(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"kept nevertheless \(embedding\)"):
        plan_of(folder, include=("*embed_tokens",))


def test_a_broken_regular_expression_is_an_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        plan_of(folder, exclude=("re:(",))


def test_names_that_would_collide_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": random(8, 8), "a.weight_packed": torch.zeros(2)}
    folder = write_checkpoint(
        tmp_path / "source", {"a.weight": random(8, 8), "a.weight_scales": torch.zeros(2)}, shards=1
    )
    assert quantized(plan_of(folder)) == {"a.weight"}
    with pytest.raises(CheckpointError, match=r"a\.weight_packed"):
        plan_of(write_checkpoint(tmp_path / "bad", tensors, shards=1))


def test_a_name_that_grows_too_long_for_readers_is_refused(tmp_path: Path) -> None:
    name = "a" * 500 + ".weight"
    folder = write_checkpoint(tmp_path / "source", {name: random(8, 8), "b.weight": random(8, 8)}, shards=1)
    with pytest.raises(CheckpointError, match="_packed', a name of over 512 bytes; keep it with --exclude"):
        plan_of(folder)
    assert quantized(plan_of(folder, exclude=("a*",))) == {"b.weight"}


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json/a", "model-00001-of-00002.i4.safetensors/a"])
def test_a_source_with_names_that_the_output_needs_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match="names that the output needs"):
        plan_of(folder)


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        (1, ["model.i4.safetensors"]),
        (2, ["model-00001-of-00002.i4.safetensors", "model-00002-of-00002.i4.safetensors"]),
    ],
)
def test_output_shards_follow_the_source(tmp_path: Path, shards: int, names: list[str]) -> None:
    folder = write_checkpoint(tmp_path / "source", shards=shards)
    assert [shard.output for shard in plan_of(folder).shards] == names
