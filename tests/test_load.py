import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import EXAMPLE, convert_folder, random, tiny_tensors, write_checkpoint
from torch import Tensor, nn

import runtime
from formats import codec
from formats.checkpoint import Checkpoint
from formats.errors import CheckpointError, TemporaryError, UsageError
from formats.layout import Scheme
from formats.manifest import MANIFEST_NAME
from runtime.integrations import when_imported


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 16)
        self.down_proj = nn.Linear(20, 9, bias=False)


class Model(nn.Module):
    """Fits `tiny_tensors`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(32, 24)
        self.model.layers = nn.ModuleList([Attention()])
        self.model.norm = nn.LayerNorm(24, bias=False)
        self.lm_head = nn.Linear(24, 32, bias=False)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert_folder(write_checkpoint(tmp_path / "source"), tmp_path / "out")
    return tmp_path / "out"


def build(change: Callable[[Model], object] = lambda model: None) -> Model:
    model = Model()
    change(model)
    return model


@pytest.mark.parametrize("meta", [True, False])
def test_load_into_gives_every_tensor_of_the_checkpoint(folder: Path, meta: bool) -> None:
    model = Model()
    if meta:
        for child in model.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[name] = nn.Parameter(parameter.to("meta"))
    assert runtime.load_into(model, folder, device="cpu", dtype=torch.float32) is model
    tensors = tiny_tensors()
    for name in ("model.embed_tokens.weight", "model.layers.0.q_proj.bias", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(model.get_parameter(name), tensors[name].float())
    for name in ("q_proj", "down_proj"):
        layer = model.get_submodule(f"model.layers.0.{name}")
        expected = codec.quantize(tensors[f"model.layers.0.{name}.weight"], Scheme(8), torch.bfloat16)
        assert isinstance(layer, runtime.Int4Linear)
        assert torch.equal(layer.weight_packed, expected.packed)
        assert torch.equal(layer.weight_scale, expected.scale)
        assert layer.weight.dtype == torch.float32
    assert model.table.tolist() == [0, 1, 2, 3]


def test_nothing_that_was_loaded_is_trainable(folder: Path) -> None:
    assert not any(p.requires_grad for p in runtime.load_into(Model(), folder, device="cpu").parameters())


class Experts(nn.Module):
    """Two experts, their matrices turned: [E, K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 24, 32))
        self.experts.down_proj = nn.Parameter(torch.zeros(2, 16, 24))
        self.experts.down_proj_bias = nn.Parameter(torch.zeros(2, 24))


@pytest.mark.parametrize("again", [False, True])
def test_stacks_of_experts_are_what_the_modules_own_code_reads(again: bool, tmp_path: Path) -> None:
    tensors = {
        "experts.gate_up_proj": random(2, 24, 32, seed=1),
        "experts.down_proj": random(2, 16, 24, seed=2),
        "experts.down_proj_bias": random(2, 24, seed=3),
    }
    manifest = convert_folder(write_checkpoint(tmp_path / "source", tensors, 1), tmp_path / "out")
    assert sum(row.transposed for row in manifest.tensors) == 2
    model = runtime.load_into(Experts(), tmp_path / "out", device="cpu")
    if again:
        runtime.load_into(model, tmp_path / "out", device="cpu")
    for name in ("gate_up_proj", "down_proj"):
        weight = tensors[f"experts.{name}"].mT
        expected = codec.dequantize(codec.quantize(weight, Scheme(8), torch.bfloat16), weight.shape[-1], Scheme(8))
        assert torch.equal(getattr(model.experts, name), expected.mT)
    assert torch.equal(model.experts.down_proj_bias, tensors["experts.down_proj_bias"].float())


class Router(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1) * self.weight.abs().mean()


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it(folder: Path) -> None:
    def route(model: Model) -> None:
        model.model.layers[0].q_proj = Router(24, 16)

    layer = runtime.load_into(build(route), folder, device="cpu", dtype=torch.float32).get_submodule(
        "model.layers.0.q_proj"
    )
    tensors, prefix = tiny_tensors(), "model.layers.0.q_proj."
    same = Router(24, 16)
    quantized = codec.quantize(tensors[f"{prefix}weight"], Scheme(8), torch.bfloat16)
    same.weight.data = codec.dequantize(quantized, 24, Scheme(8))
    same.bias.data = tensors[f"{prefix}bias"].float()
    x = random(3, 24, dtype=torch.float32)
    assert torch.equal(layer(x), same(x))
    assert layer.state_dict().keys() == {"weight_packed", "weight_scale", "bias"}


def test_a_parameter_that_is_called_like_a_scale_takes_the_type_that_is_asked_for(tmp_path: Path) -> None:
    def add_scale(model: Model) -> None:
        model.logit_scale = nn.Parameter(torch.zeros(1))

    source = write_checkpoint(tmp_path / "source", {**tiny_tensors(), "logit_scale": random(1)})
    convert_folder(source, tmp_path / "out")
    model = runtime.load_into(build(add_scale), tmp_path / "out", device="cpu", dtype=torch.float32)
    assert model.logit_scale.dtype == torch.float32
    assert model.get_submodule("model.layers.0.q_proj").weight_scale.dtype == torch.bfloat16


def test_conv1d_becomes_a_linear_layer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "out", Scheme(32))
    body = transformers.GPT2LMHeadModel(config)
    layer = runtime.load_into(body, tmp_path / "out", device="cpu").get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(layer, runtime.Int4Linear)
    expected = saved.transformer.h[0].attn.c_attn.weight.T
    assert (layer.dequantize() - expected).abs().max() < 0.02


def test_a_loaded_module_can_be_loaded_again(folder: Path) -> None:
    model = runtime.load_into(Model(), folder, device="cpu")
    runtime.load_into(model, folder, device="cpu")
    assert isinstance(model.get_submodule("model.layers.0.q_proj"), runtime.Int4Linear)


def lose_norm(model: Model) -> None:
    model.model.norm = nn.Identity()


def add_parameter(model: Model) -> None:
    model.extra = nn.Parameter(torch.zeros(1))


def widen_norm(model: Model) -> None:
    model.model.norm = nn.LayerNorm(25, bias=False)


def widen_q(model: Model) -> None:
    model.model.layers[0].q_proj = nn.Linear(24, 17)


def lose_q(model: Model) -> None:
    del model.model.layers[0].q_proj


def no_linear(model: Model) -> None:
    model.model.layers[0].q_proj = nn.Embedding(16, 24)


def meta_table(model: Model) -> None:
    model.table = model.table.to("meta")


def hidden_on_meta(model: Model) -> None:
    model.extra = nn.Parameter(torch.zeros(1, device="meta"))
    model.register_state_dict_post_hook(lambda module, state, *rest: state.__delitem__("extra"))


MISFITS: dict[str, tuple[Callable[[Model], object], str]] = {
    "the checkpoint holds more": (lose_norm, "0 tensors missing .*1 unexpected .model.norm.weight"),
    "the module needs more": (add_parameter, "1 tensors missing .extra"),
    "another shape": (widen_norm, r"'model.norm.weight' is BF16 \[24\], the model expects F32 \[25\]"),
    "another shape of a linear": (widen_q, r"int4 \[16, 24\], the model has a Linear \[17, 24\]"),
    "no such linear": (lose_q, "'model.layers.0.q_proj', which Model lacks"),
    "not a linear": (no_linear, r"the model has a Embedding \[\]"),
    "a table on meta": (meta_table, "leaves table on the meta device"),
    "a parameter on meta that is not saved": (hidden_on_meta, "leaves extra on the meta device"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_module_that_does_not_fit_exactly_is_refused(folder: Path, kind: str) -> None:
    change, message = MISFITS[kind]
    with pytest.raises(CheckpointError, match=message):
        runtime.load_into(build(change), folder, device="cpu")


def tie(model: Model) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def test_tied_weights_stay_tied_when_the_checkpoint_holds_one(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in tiny_tensors().items() if name != "lm_head.weight"}
    convert_folder(write_checkpoint(tmp_path / "source", tensors), tmp_path / "out")
    model = runtime.load_into(build(tie), tmp_path / "out", device="cpu")
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(model.get_parameter("lm_head.weight"), tensors["model.embed_tokens.weight"].float())


def test_tied_weights_part_when_the_checkpoint_holds_both(folder: Path) -> None:
    model = runtime.load_into(build(tie), folder, device="cpu", dtype=torch.bfloat16)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name), tiny_tensors()[name])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_is_refused_unless_verify_is_off(folder: Path) -> None:
    flip(sorted(folder.glob("*.i4.safetensors"))[0], -1)
    with pytest.raises(CheckpointError, match="SHA-256"):
        runtime.load_into(Model(), folder, device="cpu")
    runtime.load_into(Model(), folder, device="cpu", verify=False)


def test_a_full_gpu_is_an_error_of_one_line_with_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB. More")

    monkeypatch.setattr(Checkpoint, "stream", full)
    with pytest.raises(TemporaryError, match=r"out, 0 MB: CUDA .* allocate 2\.00 GiB\. GPU 0 has 1\.00 GiB; free some"):
        runtime.load_into(Model(), folder, device="cpu")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("example") / "out"
    convert_folder(EXAMPLE, out, Scheme(256))
    return out


def logits_of(model: nn.Module, device: str = "cpu") -> Tensor:
    tokens = torch.arange(40, device=device)[None]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens).logits
    return logits.float().cpu()


def test_load_gives_the_logits_of_the_dequantised_weights(example: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = runtime.load(example, device="cpu", dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, runtime.Int4Linear):
            reference.get_submodule(name).weight.data = layer.dequantize()
    assert sum(isinstance(layer, runtime.Int4Linear) for layer in model.modules()) == 21
    assert torch.allclose(logits_of(model), logits_of(reference), atol=1e-4)


def test_load_leaves_nothing_on_meta_and_keeps_the_checkpoints_type(example: Path) -> None:
    pytest.importorskip("transformers")
    model = runtime.load(example, device="cpu")
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def edited_example(tmp_path: Path, **fields: object) -> Path:
    """The example converted with other fields in its configuration."""
    source = tmp_path / "source"
    source.mkdir()
    for path in EXAMPLE.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **fields}))
    convert_folder(source, tmp_path / "out", Scheme(256))
    return tmp_path / "out"


def test_a_configuration_cannot_choose_the_code_of_attention(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = runtime.load(edited_example(tmp_path, attn_implementation="evil/kernel"), device="cpu")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "abc"}, {"dtype": "garbage"}, {"hidden_act": "nope"}, {"architectures": [5]},
               {"architectures": "LlamaForCausalLM"}, {"rope_parameters": {"rope_type": "nope"}}], ids=str,
)  # fmt: skip
def test_a_broken_configuration_is_a_checkpoint_error_of_one_line(tmp_path: Path, fields: dict[str, object]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match="cannot build the model") as caught:
        runtime.load(edited_example(tmp_path, **fields), device="cpu")
    assert "\n" not in str(caught.value)


def test_without_architectures_the_causal_model_of_the_type_is_built(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = runtime.load(edited_example(tmp_path, architectures=None), device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_without_a_type_in_the_configuration_that_of_the_weights_counts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = runtime.load(edited_example(tmp_path, dtype=None), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("entry", [{}, {"quantization_config": {"quant_method": "i4", "group_size": 128}}], ids=str)
def test_the_manifest_counts_whatever_the_configuration_says_of_groups(
    tmp_path: Path, entry: dict[str, object]
) -> None:
    pytest.importorskip("transformers")
    expected = logits_of(runtime.load(edited_example(tmp_path), device="cpu"))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config | entry))
    assert torch.equal(logits_of(runtime.load(tmp_path / "out", device="cpu")), expected)


def test_tables_are_computed_in_fp32_whatever_the_type_of_the_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTJConfig(vocab_size=64, n_embd=64, n_layer=1, n_head=2, rotary_dim=16, n_positions=128)
    saved = transformers.GPTJForCausalLM(config).to(torch.bfloat16)
    saved.save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "out", Scheme(32))
    expected = transformers.GPTJForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    found = runtime.load(tmp_path / "out", device="cpu")
    tables = dict(expected.named_buffers())
    assert tables
    assert all(torch.equal(buffer, tables[name]) for name, buffer in found.named_buffers() if name in tables)


def test_what_the_model_has_is_never_ignored(tmp_path: Path) -> None:
    # Its list of keys to ignore, meant for what it lacks, matches c_attn.bias.
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    saved = transformers.GPT2LMHeadModel(config)
    saved.lm_head.weight = nn.Parameter(torch.randn(64, 64) * 0.02)
    saved.config.tie_word_embeddings = False
    saved.save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "out", Scheme(32), include=("lm_head",))
    model = runtime.load(tmp_path / "out", device="cpu")
    assert torch.equal(model.transformer.h[0].attn.c_attn.bias, saved.transformer.h[0].attn.c_attn.bias)


def test_models_that_read_a_weight_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=64, d_model=64, d_ff=96, d_kv=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "out", Scheme(32))
    model = runtime.load(tmp_path / "out", device="cpu")
    tokens = torch.arange(10)[None]
    assert torch.isfinite(model(input_ids=tokens, decoder_input_ids=tokens).logits).all()


def test_several_threads_may_load_at_once(example: Path) -> None:
    pytest.importorskip("transformers")
    register = nn.Module.register_parameter
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: runtime.load(example, device="cpu"), range(4)))
    assert nn.Module.register_parameter is register
    assert not any(parameter.is_meta for model in models for parameter in model.parameters())


@pytest.mark.parametrize("change", [add_parameter, widen_norm, widen_q])
def test_a_refused_module_is_as_it_was(folder: Path, change: Callable[[Model], object]) -> None:
    model = build(change)
    with pytest.raises(CheckpointError):
        runtime.load_into(model, folder, device="cpu")
    assert not any(isinstance(child, runtime.Int4Linear) for child in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_gives_the_logits_of_the_cpu(example: Path, dtype: torch.dtype) -> None:
    expected = logits_of(runtime.load(example, device="cpu", dtype=torch.float32))
    found = logits_of(runtime.load(example, dtype=dtype), "cuda")
    assert ((found - expected).norm() / expected.norm()).item() < 0.03


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match="no architecture .'NoSuchModel'"):
        runtime.load(edited_example(tmp_path, architectures=["NoSuchModel"]), device="cpu")


def test_a_name_that_no_file_can_have_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="is neither a folder here nor a Hub id"):
        runtime.load("a" * 300)


def test_a_file_instead_of_its_folder_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"00001-of-00002.i4.safetensors: is a file; give the folder that holds it"):
        runtime.load(next(folder.glob("*-00001-*")))


def test_a_checkpoint_that_did_not_finish_is_refused(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="did not finish"):
        runtime.load(folder)


def test_without_transformers_load_names_the_extra(folder: Path) -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import runtime\n"
        "from formats.errors import UsageError\n"
        f"try:\n    runtime.load({str(folder)!r})\n"
        "except UsageError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'int4-convert[hf]', or fill a module of your own with runtime.load_into" in done.stdout


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that nobody has imported, and cannot while there is a file `broken` beside it."""
    name = "throwaway_of_test_load"
    program = "from pathlib import Path\n0 if not Path(__file__).with_name('broken').exists() else 1 / 0\n"
    (tmp_path / f"{name}.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    yield name
    sys.modules.pop(name, None)


def test_who_waits_for_a_module_is_told_once_it_is_executed(module: str, tmp_path: Path) -> None:
    told: list[str] = []
    for waiting in "ab":
        when_imported(module, partial(told.append, waiting))
    before = len(sys.meta_path)
    assert importlib.util.find_spec(module) is not None  # as many libraries look for another
    (tmp_path / "broken").touch()
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(module)
    assert (told, len(sys.meta_path)) == ([], before)
    (tmp_path / "broken").unlink()
    importlib.import_module(module)
    assert (sorted(told), len(sys.meta_path)) == (["a", "b"], before - 2)
    when_imported(module, partial(told.append, "c"))
    assert told[2:] == ["c"]
