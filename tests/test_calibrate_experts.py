"""Calibration of mixtures of experts, which transformers fuses and checkpoints hold one by one or fused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import EXAMPLE, contents, stored
from safetensors.torch import load_file, save_file
from torch import Tensor

import runtime
from converter import calibrate
from converter.calibrate import Calibration, LayerReport
from converter.convert import convert, make_recipe
from converter.observe import Call
from converter.plan import make_plan
from converter.prepared import PreparedLayers
from converter.quantize import Inputs
from converter.quantize.search import search
from converter.source import Source, open_source
from formats.codec import Quantized, dequantize
from formats.errors import CheckpointError
from formats.layout import PACKED, SCALE, Scheme
from formats.manifest import CalibrationRecord, Manifest
from formats.texts import read_text, tokenize

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

CPU = [torch.device("cpu")]
RECORD = CalibrationRecord("0" * 64, 16, 32, 0)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "num_experts_per_tok": 2}  # fmt: skip
DEEPSEEK = {"moe_intermediate_size": 24, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1,
            "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
            "v_head_dim": 16}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # configuration, its fields, tensors of experts
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4}, 24),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24}, 24),
    "DeepSeek-V3, a shared expert": ("DeepseekV3Config", DEEPSEEK, 15),
    "GPT-OSS, fused, [in, out], with biases": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 3},
        4,
    ),
}
TOKENS = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))


def random_model(name: str) -> Any:
    torch.manual_seed(0)
    config, fields, _ = MODELS[name]
    found = getattr(transformers, config)(**{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(found, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and embeddings that matter
    return model


def saved(model: Any, folder: Path) -> Source:
    model.save_pretrained(folder)
    return open_source(str(folder))


def calibration_of(source: Source, exclude: tuple[str, ...] = ()) -> Calibration:
    recipe = make_recipe(Scheme(16), "gptq", (), exclude, RECORD)
    return Calibration(source, make_plan(source, recipe), CPU[0])


def converted(source: Source, out: Path, windows: Tensor, method: str = "gptq", **options: Any) -> Manifest:
    plan = make_plan(source, make_recipe(Scheme(16), method, (), (), RECORD))
    return convert(source, plan, out, CPU, windows=windows, **options)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_layers_filled_from_the_checkpoint_do_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    calibration = calibration_of(saved(model, tmp_path / "source"))
    calls, (hidden,) = calibration.start(TOKENS)
    states = model(TOKENS, output_hidden_states=True).hidden_states
    for i, call in enumerate(calls):
        assert torch.allclose(hidden, states[i], atol=1e-5)
        hidden = call(calibration.filled(i), hidden)
    base = getattr(model, model.base_model_prefix)
    assert torch.allclose(base.norm(hidden), states[-1], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_calibrated_and_lands_where_it_belongs(name: str, tmp_path: Path) -> None:
    source = saved(random_model(name), tmp_path / "source")
    reports: list[LayerReport] = []
    manifest = converted(source, tmp_path / "out", TOKENS, calibrated=reports.append)
    assert [(report.too_few, report.other) for report in reports] == [((), ())] * 2
    tensors = stored(tmp_path / "out")
    rows = [row for row in manifest.tensors if row.quantized]
    assert sum("experts" in row.name for row in rows) == MODELS[name][2]
    for row in rows:
        assert row.error is not None
        assert row.error.output is not None
        assert 0 < row.error.output < 0.02
        weight = source.read(row.name)
        weight = weight.mT if row.transposed else weight
        matrix = Quantized(tensors[row.name + PACKED], tensors[row.name + SCALE], None)
        difference = dequantize(matrix, weight.shape[-1], Scheme(16)) - weight
        assert difference.square().sum() < 0.03 * weight.square().sum()


def mixtral_inputs(layer: Any, call: Call, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What comes into the experts of a Mixtral's own layer, and where the router sends it: by its parts, one by one."""
    found, _ = layer.self_attn(layer.input_layernorm(hidden), *call.args, **call.kwargs)
    x = layer.post_attention_layernorm(hidden + found).flatten(0, -2)
    return x, layer.mlp.gate(x)[2]


@torch.no_grad()
def test_gram_and_drift_are_of_the_tokens_that_come_to_the_expert(tmp_path: Path) -> None:
    model = random_model("Mixtral")
    source = saved(model, tmp_path / "source")
    calibration = calibration_of(source)
    calls, (before,) = calibration.start(TOKENS)
    now = before + 0.2 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    layer = calibration.filled(0)
    names = [f"mlp.experts.{leaf}.{e}" for leaf in ("gate_up_proj", "down_proj") for e in range(4)]
    found = calibration.inputs(names, layer, copy.deepcopy(layer), calls[0], [before], [now])
    meant, others = mixtral_inputs(model.model.layers[0], calls[0], before)
    seen, routes = mixtral_inputs(model.model.layers[0], calls[0], now)
    assert not torch.equal(routes.sort(1).values, others.sort(1).values)
    stem = "model.layers.0.block_sparse_moe.experts"
    for e in range(4):
        mine = (routes == e).any(1)
        first, third = (source.read(f"{stem}.{e}.{leaf}.weight") for leaf in ("w1", "w3"))
        outer = [meant[mine], seen[mine]]
        inner = [F.silu(x @ first.T) * (x @ third.T) for x in outer]
        for name, (x, y) in ((f"mlp.experts.gate_up_proj.{e}", outer), (f"mlp.experts.down_proj.{e}", inner)):
            inputs = found[name]
            assert inputs.tokens == mine.sum()
            gram = inputs.gram - inputs.damping * torch.eye(len(inputs.gram))
            assert torch.allclose(gram, y.T @ y / len(y), rtol=1e-4, atol=1e-4)
            assert inputs.drift is not None
            assert torch.allclose(inputs.drift, (x - y).T @ y / len(y), rtol=1e-4, atol=1e-4)


def test_experts_seen_one_by_one_or_all_at_once_end_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(random_model("Mixtral"), tmp_path / "source")
    converted(source, tmp_path / "at once", TOKENS, "search")
    seen: list[int] = []
    inputs = Calibration.inputs

    def note(self: Calibration, names: list[str], *rest: Any) -> dict[str, Inputs]:
        seen.append(len(names))
        return inputs(self, names, *rest)

    monkeypatch.setattr(Calibration, "inputs", note)
    for limit, most in ((1, 1), (3 * 8 * 32**2, 3)):  # three of the narrower experts, or one of the wider
        seen.clear()
        monkeypatch.setattr(calibrate, "GRAM_BYTES", limit)
        converted(source, tmp_path / str(most), TOKENS, "search")
        assert max(seen) == most
        assert contents(tmp_path / str(most)) == contents(tmp_path / "at once")


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS, fused, [in, out], with biases"])
def test_an_interrupted_run_goes_on_and_ends_the_same(name: str, tmp_path: Path) -> None:
    def stop(report: LayerReport) -> None:
        raise KeyboardInterrupt

    source = saved(random_model(name), tmp_path / "source")
    converted(source, tmp_path / "whole", TOKENS, "search")
    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "out", TOKENS, "search", calibrated=stop)
    converted(source, tmp_path / "out", TOKENS, "search")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Mixtral", "model.layers.{}.block_sparse_moe.experts.{}.w2.weight"),
        ("GPT-OSS, fused, [in, out], with biases", "model.layers.{}.mlp.experts.down_proj[{}]"),
    ],
)
def test_experts_with_fewer_tokens_than_columns_go_by_search_and_are_named(
    name: str, expected: str, tmp_path: Path
) -> None:
    calibration = calibration_of(saved(random_model(name), tmp_path / "source"))
    prepared = PreparedLayers(tmp_path / "out", "key")
    reports = list(calibration.run(TOKENS[:2, :28], prepared))  # 56 tokens, two experts of four each: 48 columns
    for i, report in enumerate(reports):
        experts = [expected.format(i, e) for e in range(4)]
        few = [full for full in experts if full in report.too_few]
        assert few
        number = experts.index(few[0])
        linear = calibration.filled(i).get_submodule(f"mlp.experts.down_proj.{number}")
        source, _, stack = few[0].partition("[")
        found = prepared.find(source)
        assert found is not None
        plain = search(linear.weight.data, Scheme(16), torch.bfloat16)
        assert torch.equal(found.matrix(number if stack else None).packed, plain.packed)


def test_a_projection_that_is_kept_leaves_its_rows_alone(tmp_path: Path) -> None:
    source = saved(random_model("Qwen3-MoE"), tmp_path / "source")
    calibration = calibration_of(source, exclude=("*.gate_proj",))
    layer = calibration.filled(0)
    parts, other = calibration.parts(0, layer)
    name = "mlp.experts.gate_up_proj.3"
    (up,) = parts[name]
    assert (up.source, up.rows, other) == ("model.layers.0.mlp.experts.3.up_proj.weight", slice(24, 48), [])
    calls, (hidden,) = calibration.start(TOKENS)
    rounded = copy.deepcopy(layer)
    calibration.quantized(parts, layer, rounded, calls[0], [hidden], [hidden])
    plain, found = (one.get_submodule(name).weight for one in (layer, rounded))
    assert torch.equal(plain[:24], found[:24])
    assert not torch.isclose(plain[24:], found[24:]).all(1).any()


def test_rows_that_are_not_what_the_source_holds_go_by_search_and_are_named(tmp_path: Path) -> None:
    calibration = calibration_of(saved(random_model("Mixtral"), tmp_path / "source"))
    layer = calibration.filled(0)
    experts: Any = layer.get_submodule("mlp.experts.down_proj")
    experts[0].weight, experts[1].weight = experts[1].weight, experts[0].weight
    parts, other = calibration.parts(0, layer)
    assert other == [f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)]
    assert not [name for name in parts if "down_proj" in name]


def test_a_checkpoint_without_one_of_the_experts_is_refused(tmp_path: Path) -> None:
    saved(random_model("Mixtral"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    calibration = calibration_of(open_source(str(tmp_path)))
    calibration.filled(0)
    with pytest.raises(CheckpointError, match=r"down_proj' \[3, 32, 48\].* expects \[4, 32, 48\]; are some experts"):
        calibration.filled(1)


@pytest.mark.parametrize("rows", [13, 16])
def test_rows_of_a_stack_are_those_of_its_matrices(rows: int) -> None:
    scheme = Scheme(16, symmetric=False)
    matrices = [search(torch.randn(rows, 32), scheme, torch.bfloat16) for _ in range(3)]
    stack = Quantized.stacked(matrices)
    for i, matrix in enumerate(matrices):
        found = stack.rows(i * rows + 8, (i + 1) * rows, CPU[0]).tensors()
        expected = matrix.rows(8, rows, CPU[0]).tensors()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


STEPS = 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Any, Tensor]:
    """A Mixtral of 4 experts that has learnt some of a text, and windows of what it has not seen."""
    ids = tokenize(EXAMPLE, read_text(EXAMPLE.parent / "tiny-llama.heldout.txt"))
    windows = torch.as_tensor(ids)[: len(ids) // 64 * 64].view(-1, 64)
    torch.manual_seed(0)
    fields = {**SIZES, "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**fields, num_local_experts=4, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        batch = windows[64:][torch.randint(len(windows) - 64, (8,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return saved(model.eval(), tmp_path_factory.mktemp("trained")), model, windows


@torch.no_grad()
def divergence(model: Any, folder: Path, windows: Tensor) -> float:
    """KL(original ‖ quantised), a mean over tokens in nats."""
    loaded = runtime.load(folder, device="cpu")
    first, second = (one(windows).logits.log_softmax(-1) for one in (model, loaded))
    return F.kl_div(second, first, log_target=True, reduction="sum").item() / windows.numel()


def test_a_trained_mixture_loses_less_by_gptq_than_by_search(
    trained: tuple[Source, Any, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model, windows = trained

    def lost(method: str, name: str, record: CalibrationRecord | None = RECORD) -> float:
        plan = make_plan(source, make_recipe(Scheme(-1), method, (), (), record))
        convert(source, plan, tmp_path / name, CPU, windows=None if record is None else windows[64:192])
        return divergence(model, tmp_path / name, windows[:64])

    gptq, search_alone = lost("gptq", "gptq"), lost("search", "search", None)
    monkeypatch.setattr(calibrate, "take_apart", lambda layer: None)
    experts_by_search = lost("gptq", "experts by search")
    assert gptq < 0.6 * search_alone
    assert gptq < 0.8 * experts_by_search
