"""The quantisation method `i4` of transformers: its own `from_pretrained`, on small random models."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import convert_folder, stored, write_index
from safetensors.torch import load_file, save_file
from test_architectures import GROUPED, IDS, SCHEME, ZAMBA, dequantized, logits, random_model

import runtime
from formats.errors import CheckpointError
from formats.layout import TensorSpec
from formats.manifest import read_manifest

transformers = pytest.importorskip("transformers")

from runtime.experts import Int4Experts  # noqa: E402 - behind the check for transformers
from runtime.integrations.names import Targets  # noqa: E402
from runtime.integrations.transformers import Int4Config  # noqa: E402

WHOLE = {**GROUPED, "intermediate_size": 128}  # halves of it are whole groups
EXPERTS = {"num_local_experts": 4}
MIXTRAL = {**WHOLE, **EXPERTS}


def converted(tmp_path: Path, config: str = "LlamaConfig", **fields: Any) -> Path:
    """The folder of an int4 checkpoint of a random model."""
    random_model(config, fields or WHOLE).save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    return tmp_path / "out"


def reference(folder: Path) -> Any:
    """The model that was converted to `folder`, with the values that the codec gives its matrices."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "source")
    return dequantized(model, read_manifest(folder))


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, variant="i4", **options)


def test_layers_stay_int4_and_have_the_logits_of_the_dequantised_weights(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    loaded = load(folder)
    logits(loaded)  # not only until they are used
    assert sum(isinstance(layer, runtime.Int4Linear) for layer in loaded.modules()) == 14
    assert torch.allclose(logits(loaded), logits(reference(folder)), atol=1e-5)


def test_dequantised_it_is_a_model_of_plain_layers(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    plain = load(folder, quantization_config=Int4Config(dequantize=True), dtype=torch.bfloat16)
    expected = reference(folder).to(torch.bfloat16)
    assert not any(isinstance(layer, runtime.Int4Linear) for layer in plain.modules())
    assert not hasattr(plain.config, "quantization_config")
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in plain.named_parameters())


def test_a_loaded_model_can_be_dequantised_later(tmp_path: Path) -> None:
    folder = converted(tmp_path, "MixtralConfig", **MIXTRAL)
    plain = load(folder).dequantize()
    assert not any(isinstance(layer, runtime.Int4Linear | Int4Experts) for layer in plain.modules())
    assert torch.allclose(logits(plain), logits(load(folder)), atol=1e-5)


def test_a_model_that_was_saved_can_be_dequantised(tmp_path: Path) -> None:
    loaded = load(converted(tmp_path))
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "again", variant="i4")
    assert torch.allclose(logits(loaded.dequantize()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "fields"), [("LlamaConfig", WHOLE), ("MixtralConfig", MIXTRAL), ("ZambaConfig", ZAMBA)]
)
def test_saving_writes_the_tensors_back_byte_for_byte(config: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = converted(tmp_path, config, **fields)
    load(folder).save_pretrained(tmp_path / "again", variant="i4")
    before, after = stored(folder), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(folder)))


def test_experts_that_are_stored_one_by_one_become_stacks(tmp_path: Path) -> None:
    folder = converted(tmp_path, "MixtralConfig", **MIXTRAL)
    loaded = load(folder)
    experts = [layer for layer in loaded.modules() if isinstance(layer, Int4Experts)]
    assert [tuple(one.gate_up_proj_packed.shape) for one in experts] == [(4, 256, 8)] * 2
    plain = load(folder, quantization_config=Int4Config(dequantize=True))
    assert torch.allclose(logits(loaded), logits(plain), atol=1e-5)


def test_what_is_renamed_takes_the_type_of_the_model(tmp_path: Path) -> None:
    loaded = load(converted(tmp_path, "MixtralConfig", **MIXTRAL), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters() if parameter.is_floating_point()} == {torch.bfloat16}
    assert torch.isfinite(logits(loaded)).all()


GEMMA_3N = {
    **GROUPED, "intermediate_size": [96, 96], "head_dim": 16, "num_kv_shared_layers": 0, "laurel_rank": 32,
    "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.95, 0.0],
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16,
}  # fmt: skip


def test_what_is_called_like_a_scale_takes_the_type_of_the_model(tmp_path: Path) -> None:
    loaded = load(converted(tmp_path, "Gemma3nTextConfig", **GEMMA_3N), dtype=torch.bfloat16)
    assert loaded.get_parameter("model.layers.0.altup.correct_output_scale").dtype == torch.bfloat16


def test_what_is_called_like_a_scale_is_kept() -> None:
    model = random_model("Gemma3nTextConfig", GEMMA_3N)
    names = {name for name, _ in model.named_parameters()}
    assert any(name.endswith("_scale") for name in names)
    assert Targets(model, None).assign(dict.fromkeys(names, TensorSpec("F32", (1,)))) == ({}, names)


def test_what_is_int4_and_neither_linear_nor_experts_is_named_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(tmp_path)
    monkeypatch.setattr("runtime.integrations.transformers.shape_in", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match=r"'(model\.\S+)' is int4, .*; expected a linear layer .* --exclude '\1'"):
        load(folder)


def test_the_models_own_code_may_read_the_experts(tmp_path: Path) -> None:
    folder = converted(tmp_path, "MixtralConfig", **MIXTRAL)
    experts = load(folder).model.layers[0].mlp.experts
    plain = load(folder, quantization_config=Int4Config(dequantize=True)).model.layers[0].mlp.experts
    assert torch.equal(experts.gate_up_proj, plain.gate_up_proj)


def test_a_static_cache_compiles_and_generates_the_same(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    model = load(folder)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert model.hf_quantizer.is_compileable
    eager = model.generate(IDS[:, :4], **options)
    static = model.generate(IDS[:, :4], cache_implementation="static", **options)
    assert torch.equal(eager, static)


def test_the_compiler_takes_layers_and_experts_whole(tmp_path: Path) -> None:
    folder = converted(tmp_path, "MixtralConfig", **MIXTRAL)
    model = load(folder)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled), logits(model), atol=1e-5)


def test_gradients_pass_through_experts(tmp_path: Path) -> None:
    folder = converted(tmp_path, "MixtralConfig", **MIXTRAL)
    model = load(folder)
    model(IDS).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_another_type_leaves_the_scales_of_experts_as_stored(tmp_path: Path) -> None:
    model = runtime.load_into(random_model("MixtralConfig", MIXTRAL), converted_fused(tmp_path), device="cpu")
    experts = model.model.layers[0].mlp.experts
    scale = experts.down_proj_scale.detach().clone()
    model.half()
    assert torch.equal(experts.down_proj_scale, scale)
    assert scale.dtype == torch.bfloat16
    assert experts.down_proj.dtype == torch.float16


def converted_fused(tmp_path: Path) -> Path:
    """The folder of an int4 checkpoint that holds the experts as the model does."""
    model = random_model("MixtralConfig", MIXTRAL)
    (tmp_path / "source").mkdir()
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "source" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "out", SCHEME)
    return tmp_path / "out"


def test_a_model_of_experts_can_be_copied_and_pickled(tmp_path: Path) -> None:
    model = load(converted(tmp_path, "MixtralConfig", **MIXTRAL))
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), expected)


def test_the_compiler_takes_experts_whole_where_gradients_are_wanted(tmp_path: Path) -> None:
    model = load(converted(tmp_path, "MixtralConfig", **MIXTRAL))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(IDS).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_tokens_of_other_processes_experts_are_left_out(tmp_path: Path) -> None:
    model = load(converted(tmp_path, "MixtralConfig", **MIXTRAL))
    experts = model.model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    x, weights = torch.randn(3, 64), torch.full((3, 2), 0.5)
    with torch.no_grad():
        expected = experts(x, torch.tensor([[0, 1], [2, 3], [1, 2]]), weights * torch.tensor([[1, 1], [1, 0], [1, 1]]))
        found = experts(x, torch.tensor([[0, 1], [2, 4], [1, 2]]), weights)  # 4: an expert elsewhere
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_new_head_may_be_random(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, variant="i4", num_labels=3)
    assert model.score.weight.shape == (3, 64)
    assert sum(isinstance(layer, runtime.Int4Linear) for layer in model.modules()) == 14


@pytest.mark.parametrize("order", ["runtime, transformers", "transformers, runtime"])
def test_the_method_is_known_whatever_is_imported_first(order: str, tmp_path: Path) -> None:
    folder = converted(tmp_path)
    program = (
        f"import {order}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, variant='i4')\n"
        "print(sum(isinstance(layer, runtime.Int4Linear) for layer in model.modules()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "14"


def test_a_device_map_may_choose(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = converted(tmp_path)
    assert torch.equal(logits(load(folder, device_map="auto").cpu()), logits(load(folder)))


TENSOR_PARALLEL = """
import os, sys, torch, runtime, transformers
torch.set_num_threads(1)
torch.distributed.init_process_group(sys.argv[2])
if sys.argv[3] == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], variant="i4", tp_plan="auto")
layer = model.model.layers[0].self_attn.q_proj
with torch.no_grad():
    logits = model(torch.arange(20, device=sys.argv[3])[None]).logits.cpu()
torch.save((logits, type(layer).__name__, list(layer.weight_packed.shape)), f"{sys.argv[1]}/{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()  # else gloo's threads may outlive the interpreter, and abort
"""


def two_processes(folder: Path, backend: str = "gloo", device: str = "cpu") -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(TENSOR_PARALLEL)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [*run, str(folder / "program.py"), str(folder), backend, device]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize(("config", "fields"), [("LlamaConfig", WHOLE), ("MixtralConfig", MIXTRAL)])
def test_two_processes_hold_half_of_each_layer(config: str, fields: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = converted(tmp_path, config, **fields)
    expected = logits(load(folder))
    done = two_processes(folder)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found, kind, shape = torch.load(folder / f"{rank}.pt")
        assert (kind, shape) == ("Int4Linear", [32, 8])
        assert torch.allclose(found, expected, atol=1e-5)


def test_processes_that_would_share_a_group_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    done = two_processes(converted(tmp_path, **{**WHOLE, "intermediate_size": 96}))
    assert done.returncode != 0
    assert "'model.layers.0.mlp.down_proj.weight': has 96 columns in groups of 32, a process would hold" in done.stderr


def drop(folder: Path, *names: str) -> None:
    """Take tensors out of the shard, and the index."""
    path = folder / "model.i4.safetensors"
    tensors = load_file(path)
    for name in names:
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    write_index(folder, dict.fromkeys(tensors, path.name))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("names", [[f"{Q}_scale"], [f"{Q}_packed", f"{Q}_scale"]], ids=["scale", "both"])
def test_a_model_is_never_half_random(names: list[str], tmp_path: Path) -> None:
    folder = converted(tmp_path)
    drop(folder, *names)
    with pytest.raises(CheckpointError, match=r"q_proj|scale"):
        load(folder)


BIG = {**WHOLE, "hidden_size": 256, "intermediate_size": 512}  # what the kernels of a GPU take


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "fields"), [("LlamaConfig", BIG), ("MixtralConfig", {**BIG, **EXPERTS})])
def test_a_gpu_has_the_logits_of_the_cpu(config: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = converted(tmp_path, config, **fields)
    expected = logits(load(folder))
    model = load(folder, device_map="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        found = model(IDS.cuda()).logits.float().cpu()
    assert ((found - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "fields"), [("LlamaConfig", BIG), ("MixtralConfig", {**BIG, **EXPERTS})])
def test_a_gpu_compiles_with_a_static_cache(config: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = load(converted(tmp_path, config, **fields), device_map="cuda", dtype=torch.bfloat16)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    eager = model.generate(IDS[:, :4].cuda(), **options)
    static = model.generate(IDS[:, :4].cuda(), cache_implementation="static", **options)
    assert eager.shape == static.shape == (1, 12)
    assert (eager == static).float().mean() > 0.5  # near ties may fall otherwise in other kernels


@pytest.mark.gpu
def test_saving_from_a_gpu_writes_the_tensors_back_byte_for_byte(tmp_path: Path) -> None:
    folder = converted(tmp_path, "MixtralConfig", **{**BIG, **EXPERTS})
    load(folder, device_map="cuda").save_pretrained(tmp_path / "again", variant="i4")
    before, after = stored(folder), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("config", "fields"), [("LlamaConfig", BIG), ("MixtralConfig", {**BIG, **EXPERTS})])
def test_two_gpus_hold_half_of_each_layer(config: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = converted(tmp_path, config, **fields)
    expected = logits(load(folder))
    done = two_processes(folder, "nccl", "cuda")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found, kind, _ = torch.load(folder / f"{rank}.pt")
        assert kind == "Int4Linear"
        assert ((found.float() - expected).norm() / expected.norm()).item() < 0.03
