import copy
from collections.abc import Callable

import pytest
import torch
from checkpoints import random
from torch import nn
from torch.nn import functional as F

from formats import codec
from formats.errors import NonFiniteError, UsageError
from formats.layout import Scheme
from runtime import Int4Linear, quantize_

SCHEMES = [Scheme(-1), Scheme(8), Scheme(64, symmetric=False), Scheme(256)]


def linear(rows: int = 37, columns: int = 172, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(random(rows, columns))
    return layer.requires_grad_(False)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (0,), (2, 3), (2, 0, 3)])
def test_forward_is_a_linear_layer_with_the_dequantised_weight(
    scheme: Scheme, bias: bool, leading: tuple[int, ...]
) -> None:
    layer = linear(bias=bias)
    int4 = Int4Linear.from_linear(layer, scheme)
    x = random(*leading, 172, dtype=torch.float32)
    expected = nn.functional.linear(x, int4.dequantize(), layer.bias)
    assert torch.allclose(int4(x), expected, atol=1e-6)
    assert int4(x).shape == (*leading, 37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_has_the_type_of_the_input(dtype: torch.dtype) -> None:
    assert Int4Linear.from_linear(linear(), Scheme(64))(random(2, 172, dtype=dtype)).dtype == dtype


def test_the_state_dict_is_what_the_format_stores() -> None:
    layer = linear(dtype=torch.bfloat16)
    state = Int4Linear.from_linear(layer, Scheme(64, symmetric=False)).state_dict()
    quantized = codec.quantize(layer.weight, Scheme(64, symmetric=False), torch.bfloat16)
    assert torch.equal(state.pop("bias"), layer.bias)
    assert torch.equal(state.pop("weight_packed"), quantized.packed)
    assert torch.equal(state.pop("weight_scale"), quantized.scale)
    assert torch.equal(state.pop("weight_zero_point"), quantized.zero_point)
    assert not state


def test_a_state_dict_loads_into_an_empty_layer() -> None:
    int4 = Int4Linear.from_linear(linear(), Scheme(64))
    empty = Int4Linear(172, 37, Scheme(64), dtype=torch.float32)
    empty.load_state_dict(int4.state_dict())
    x = random(3, 172, dtype=torch.float32)
    assert torch.equal(empty(x), int4(x))


def test_a_change_of_type_leaves_the_scales() -> None:
    int4 = Int4Linear.from_linear(linear(dtype=torch.bfloat16), Scheme(64))
    scale = int4.weight_scale.clone()
    int4.half()
    assert int4.bias is not None
    assert int4.bias.dtype == torch.float16
    assert int4.weight_scale.dtype == torch.bfloat16
    assert torch.equal(int4.weight_scale, scale)


def test_the_layer_compiles_as_one_graph() -> None:
    int4 = Int4Linear.from_linear(linear(), Scheme(64))
    x = random(3, 172, dtype=torch.float32)
    assert torch.equal(torch.compile(int4, fullgraph=True, backend="eager")(x), int4(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_operator_is_well_formed(symmetric: bool) -> None:
    int4 = Int4Linear.from_linear(linear(), Scheme(64, symmetric))
    x = random(3, 172, dtype=torch.float32)
    arguments = (x, int4.weight_packed, int4.weight_scale, int4.weight_zero_point, int4.bias, 64)
    torch.library.opcheck(torch.ops.int4.linear.default, arguments)


@pytest.mark.parametrize("columns", [164, 170, 176, 256])
def test_another_number_of_columns_is_refused(columns: int) -> None:
    with pytest.raises(ValueError, match=f"with {columns} columns, the layer takes 172"):
        Int4Linear.from_linear(linear(), Scheme(64))(random(2, columns, dtype=torch.float32))


def test_the_weight_can_be_looked_at_in_the_type_of_its_source() -> None:
    int4 = Int4Linear.from_linear(linear(bias=False, dtype=torch.bfloat16), Scheme(64))
    assert torch.equal(int4.weight, int4.dequantize(torch.bfloat16))
    assert int4.half().weight.dtype == torch.float16


def test_torchs_own_attention_runs_with_int4_layers() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval().requires_grad_(False)
    x = random(2, 5, 32, dtype=torch.float32)
    expected = layer(x)
    assert (quantize_(layer, group_size=32)(x) - expected).norm() < 0.2 * expected.norm()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 24)
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(24, 24), "gate": nn.Linear(24, 4)})])
        self.shared_a = nn.Linear(24, 24)
        self.shared_b = nn.Linear(24, 24)
        self.shared_b.weight = self.shared_a.weight
        self.lm_head = nn.Linear(24, 32, bias=False)
        self.lm_head.weight = self.embed.weight


def test_quantize_replaces_linears_in_place_and_keeps_heads_routers_and_shared_weights() -> None:
    model = Model()
    assert quantize_(model, group_size=8) is model
    assert {name for name, child in model.named_modules() if isinstance(child, Int4Linear)} == {"layers.0.proj"}
    assert model.lm_head.weight is model.embed.weight


def test_quantize_is_the_codecs_work() -> None:
    model = nn.Sequential(linear())
    weight = model[0].weight.clone()
    quantize_(model, group_size=64, symmetric=False)
    quantized = codec.quantize(weight, Scheme(64, symmetric=False), torch.bfloat16)
    assert torch.equal(model[0].dequantize(), codec.dequantize(quantized, 172, Scheme(64, symmetric=False)))


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(2 * x, self.weight)


def test_quantize_leaves_a_kind_of_linear_layer_with_a_forward_of_its_own() -> None:
    model = quantize_(nn.Sequential(Doubling(64, 64, bias=False), nn.Linear(64, 64)), group_size=8)
    assert [type(layer) for layer in model] == [Doubling, Int4Linear]


def test_quantize_leaves_what_a_pattern_excludes() -> None:
    model = nn.Sequential(linear(), linear(172, 37))
    quantize_(model, group_size=8, exclude=("1",))
    assert [type(child) for child in model] == [Int4Linear, nn.Linear]


def test_quantize_names_the_layer_with_a_bad_weight() -> None:
    model = nn.Sequential(linear())
    model[0].weight[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="0: .*row 2, column 3"):
        quantize_(model, group_size=8)


def test_quantize_refuses_a_weight_without_numbers() -> None:
    with pytest.raises(UsageError, match="0: its weight is on the meta device"):
        quantize_(nn.Sequential(nn.Linear(16, 8, device="meta")), group_size=8)


def test_quantize_refuses_a_layer_that_it_could_replace_nowhere() -> None:
    with pytest.raises(UsageError, match="given a layer alone"):
        quantize_(linear(), group_size=8)


def test_quantize_refuses_an_impossible_group_size() -> None:
    with pytest.raises(UsageError, match="group size 7"):
        quantize_(nn.Sequential(linear()), group_size=7)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_gradients_reach_input_and_bias(mode: str) -> None:
    int4 = Int4Linear.from_linear(linear(), Scheme(64, symmetric=False))
    assert int4.bias is not None
    int4.bias.requires_grad_()
    x = random(2, 3, 172, dtype=torch.float32).requires_grad_()
    weight = random(2, 3, 37, seed=9, dtype=torch.float32)
    call = torch.compile(int4, fullgraph=True, backend="aot_eager") if mode == "compiled" else int4
    (call(x) * weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight @ int4.dequantize(), atol=1e-5)
    assert torch.allclose(int4.bias.grad, weight.sum((0, 1)), atol=1e-5)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.int64"):
        Int4Linear.from_linear(linear(), Scheme(64))(torch.ones(2, 172, dtype=torch.int64))


def test_a_copy_is_in_the_order_of_the_format() -> None:
    repack = pytest.importorskip("runtime.repack", reason="Triton is not on this platform")
    if torch.cuda.is_available():
        pytest.skip("the interpreter stands in for a GPU")
    int4 = Int4Linear.from_linear(linear(64, 128, dtype=torch.bfloat16), Scheme(64))
    packed = int4.weight_packed.clone()
    int4.hold(repack.arrange(int4.quantized))  # as on Hopper
    copied = copy.deepcopy(int4)
    assert not copied.arranged
    assert torch.equal(copied.weight_packed, packed)


@pytest.mark.parametrize("make", [nn.Sequential, lambda *layers: nn.ModuleList(layers)])
def test_a_layer_under_several_names_stays_one_layer(make: Callable[..., nn.Module]) -> None:
    layer = linear()
    assert all(child is layer for child in quantize_(make(layer, layer), group_size=8).children())


def test_a_weight_that_is_computed_stays() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(linear()))
    assert not isinstance(quantize_(model, group_size=8)[0], Int4Linear)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 100])
def test_every_number_of_tokens_works_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    int4 = Int4Linear.from_linear(linear(), Scheme(64)).cuda()
    x = random(tokens, 172, dtype=dtype).cuda()
    expected = nn.functional.linear(x.double(), int4.dequantize(torch.float64), int4.bias.double())
    assert int4(x).dtype == dtype
    assert torch.allclose(int4(x).double(), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64])
def test_a_cuda_graph_takes_the_compiled_layer(tokens: int) -> None:
    int4 = Int4Linear.from_linear(linear(256, 512, dtype=torch.bfloat16), Scheme(128)).cuda()
    compiled = torch.compile(int4, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        x = random(tokens, 512, seed=seed).cuda()
        assert torch.equal(compiled(x), int4(x))


@pytest.mark.gpu
def test_a_layer_works_on_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    int4 = Int4Linear.from_linear(linear(256, 512, dtype=torch.bfloat16), Scheme(128))
    x = random(40, 512)
    for tokens in (1, 40):
        expected = int4.to("cuda:0")(x[:tokens].to("cuda:0")).cpu()
        assert torch.equal(int4.to("cuda:1")(x[:tokens].to("cuda:1")).cpu(), expected)


@pytest.mark.gpu
def test_an_arranged_layer_still_gives_the_formats_state_dict() -> None:
    int4 = Int4Linear.from_linear(linear(256, 512, dtype=torch.bfloat16), Scheme(128))
    expected = {name: tensor.clone() for name, tensor in int4.state_dict().items()}
    moved = int4.cuda()
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in moved.state_dict().items())
    moved.load_state_dict(expected)
    back = moved.cpu()
    assert not back.arranged
    assert torch.equal(back.weight_packed, expected["weight_packed"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_arranged_layer_takes_other_types_too(dtype: torch.dtype) -> None:
    int4 = Int4Linear.from_linear(linear(256, 512, dtype=torch.bfloat16), Scheme(128)).cuda()
    x = random(20, 512, dtype=dtype).cuda()
    expected = x.double() @ int4.dequantize(torch.float64).T + int4.bias.double()
    assert (int4(x).double() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_a_compiler_traces_a_weight_that_is_read() -> None:
    layer = Int4Linear.from_linear(nn.Linear(64, 32), Scheme(32))
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x: F.linear(x, layer.weight), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), F.linear(x, layer.weight), atol=1e-6)
