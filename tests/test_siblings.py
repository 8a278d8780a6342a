import copy
import io
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from checkpoints import EXAMPLE, convert_folder, random, write_checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import runtime
from formats.layout import Scheme
from runtime import Int4Linear
from runtime.ops import int4_linear
from runtime.siblings import PATIENCE, join

SYMMETRIC, ASYMMETRIC = Scheme(32), Scheme(32, symmetric=False)
needs_compiler = pytest.mark.skipif(not which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")
NAMES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64, "gate_proj": 96, "up_proj": 96, "down_proj": 64}


def int4(
    rows: int,
    columns: int = 64,
    scheme: Scheme = SYMMETRIC,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Int4Linear:
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(random(rows, columns, seed=seed))
    if bias:
        linear.bias.copy_(random(rows, seed=seed + 1))
    return Int4Linear.from_linear(linear, scheme)


class Block(nn.Module):
    """The linear layers of a decoder layer, called as models do."""

    def __init__(self, scheme: Scheme = SYMMETRIC, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for seed, (name, rows) in enumerate(ROWS.items()):
            columns = 96 if name == "down_proj" else 64
            setattr(self, name, int4(rows, columns, scheme, bias=bias, dtype=dtype, seed=10 * seed))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.layer_norm(x, (64,))
        x = x + self.o_proj(self.q_proj(h) * torch.cat((self.k_proj(h), self.v_proj(h)), -1))
        h = nn.functional.layer_norm(x, (64,))
        return x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


def layers_of(block: nn.Module, names: tuple[str, ...] = NAMES) -> list[Int4Linear]:
    layers = [block.get_submodule(name) for name in names]
    assert all(isinstance(layer, Int4Linear) for layer in layers)
    return layers  # type: ignore[return-value]


def attention(scheme: Scheme = SYMMETRIC, *, bias: bool = False) -> tuple[list[Int4Linear], list[Int4Linear]]:
    """The joined q, k and v of a block, and the same layers single."""
    block = Block(scheme, bias=bias)
    single = copy.deepcopy(block)
    join(block)
    return layers_of(block, NAMES[:3]), layers_of(single, NAMES[:3])


def arrange(block: nn.Module, names: tuple[str, ...] = NAMES) -> None:
    """Put layers into kernel order, as they are on Hopper."""
    repack = pytest.importorskip("runtime.repack", reason="Triton is not on this platform")
    if torch.cuda.is_available():
        pytest.skip("the interpreter stands in for a GPU")
    for layer in layers_of(block, names):
        layer.hold(repack.arrange(layer.quantized))


class Calls(TorchDispatchMode):
    """Counts those of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is int4_linear
        return func(*args, **kwargs or {})


def calls_of(function: Callable[[], object]) -> int:
    with Calls() as calls:
        function()
    return calls.count


X = random(2, 5, 64, seed=99, dtype=torch.float32)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Which layers are siblings


CHANGES: dict[str, Callable[[Block], object]] = {
    "one is missing": lambda block: delattr(block, "v_proj"),
    "another number of columns": lambda block: setattr(block, "k_proj", int4(32, 96)),
    "another group size": lambda block: setattr(block, "k_proj", int4(32, scheme=Scheme(64))),
    "zero points": lambda block: setattr(block, "k_proj", int4(32, scheme=ASYMMETRIC)),
    "a bias": lambda block: setattr(block, "k_proj", int4(32, bias=True)),
    "another type of weight": lambda block: setattr(block, "k_proj", int4(32, dtype=torch.bfloat16)),
    "another type of scales": lambda block: setattr(
        block.k_proj, "weight_scale", block.get_submodule("k_proj").get_buffer("weight_scale").half()
    ),
    "another device": lambda block: block.get_submodule("k_proj").to("meta"),
    "another order": lambda block: arrange(block, ("k_proj",)),
    "one is wrapped, as by LoRA": lambda block: setattr(block, "k_proj", nn.Sequential(int4(32))),
    "one is not quantised": lambda block: setattr(block, "k_proj", nn.Linear(64, 32)),
    "one stands for two": lambda block: setattr(block, "v_proj", block.k_proj),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_that_differ_stay_single(change: Callable[[Block], object]) -> None:
    block = Block()
    change(block)
    assert join(block) == 1
    assert block.get_submodule("q_proj").sibling is None
    assert block.get_submodule("up_proj").sibling is not None


@pytest.mark.parametrize(
    ("rows", "scheme", "in_kernel_order", "groups"),
    [(24, SYMMETRIC, True, 0), (32, SYMMETRIC, True, 1), (20, ASYMMETRIC, False, 0), (24, ASYMMETRIC, False, 1),
     (19, SYMMETRIC, False, 1)], ids=str,
)  # fmt: skip
def test_only_layers_of_whole_blocks_are_joined(rows: int, scheme: Scheme, in_kernel_order: bool, groups: int) -> None:
    parent = nn.ModuleDict({"gate_proj": int4(rows, scheme=scheme), "up_proj": int4(rows, scheme=scheme)})
    if in_kernel_order:
        arrange(parent, ("gate_proj", "up_proj"))
    assert join(parent) == groups


def test_siblings_of_one_parent_only_are_joined() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"gate_proj": int4(32)}), "b": nn.ModuleDict({"up_proj": int4(32)})})
    assert join(model) == 0


def test_a_layer_of_two_parents_is_joined_once() -> None:
    gate = int4(32)
    model = nn.ModuleList([nn.ModuleDict({"gate_proj": gate, "up_proj": int4(32)}) for _ in range(2)])
    assert join(model) == 1


def test_what_is_joined_is_not_joined_again() -> None:
    block = Block()
    assert [join(block), join(block)] == [2, 0]


def test_layers_on_a_cpu_are_left_when_a_gpu_is_meant() -> None:
    assert join(Block(), gpu_only=True) == 0


# The product


@pytest.mark.parametrize("leading", [(), (1,), (0, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=str)
def test_joined_layers_give_what_single_ones_give(scheme: Scheme, bias: bool, leading: tuple[int, ...]) -> None:
    single = Block(scheme, bias=bias)
    joined = copy.deepcopy(single)
    x = random(*leading, 64, dtype=torch.float32)
    assert join(joined) == 2
    close(joined(x), single(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_joined_layers_of_half_precision_agree_to_rounding(dtype: torch.dtype) -> None:
    joined, single = attention(bias=True)
    for one, other in zip(joined, single, strict=True):
        torch.testing.assert_close(one(X.to(dtype)), other(X.to(dtype)), atol=2e-2, rtol=2e-2)


def test_joined_layers_in_kernel_order_give_what_single_ones_give() -> None:
    block = Block()
    expected = block(X)
    arrange(block)
    assert join(block) == 2
    close(block(X), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_group_calls_the_operator_once(mode: Callable[[], Any]) -> None:
    block = Block(bias=True)
    before = calls_of(lambda: block(X))
    join(block)
    with mode():
        assert (before, calls_of(lambda: block(X))) == (7, 4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_siblings_may_be_called_in_any_order(order: tuple[int, ...]) -> None:
    joined, single = attention()
    for i in order:
        close(joined[i](X), single[i](X))
    assert calls_of(lambda: [joined[i](X) for i in order]) == 1


def test_nothing_is_kept_once_all_siblings_were_called() -> None:
    joined, _ = attention()
    x = X.clone()
    alive = weakref.ref(x)
    for layer in joined:
        layer(x)
    del x
    assert alive() is None


def test_another_input_has_its_own_product() -> None:
    joined, single = attention()
    other = X + 1
    joined[0](X)
    close(joined[1](other), single[1](other))
    close(joined[2](X), single[2](X))


def test_an_equal_input_that_is_another_tensor_has_its_own_product() -> None:
    joined, _ = attention()
    assert calls_of(lambda: [joined[0](X), joined[1](X.clone())]) == 2


def test_a_second_call_is_right() -> None:
    joined, single = attention()
    for i in (0, 0, 1, 1):
        close(joined[i](X), single[i](X))


def test_an_input_that_changed_in_place_has_its_own_product() -> None:
    joined, single = attention()
    x = X.clone()
    joined[0](x)
    x.view(-1)[3:].mul_(2)
    close(joined[1](x), single[1](x))


@pytest.mark.parametrize("then", [0, 1])
def test_the_columns_of_a_sibling_may_be_changed_in_place(then: int) -> None:
    joined, single = attention()
    joined[0](X).zero_()
    close(joined[then](X), single[then](X))


# Weights and biases


@pytest.mark.parametrize("in_kernel_order", [False, True])
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=str)
def test_the_weights_of_a_group_are_in_memory_once(scheme: Scheme, in_kernel_order: bool) -> None:
    block = Block(scheme)
    if in_kernel_order and scheme.symmetric:
        arrange(block)
    join(block)
    layers = layers_of(block, NAMES[:3])
    for name, whole in layers[0].sibling.group.joint.named_buffers():  # type: ignore[union-attr]
        parts = [layer.get_buffer(name) for layer in layers]
        assert sum(part.numel() for part in parts) == whole.numel()
        assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}


def test_joining_holds_one_group_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([Block() for _ in range(3)])
    groups = [layers_of(block, names) for block in model for names in (NAMES[:3], NAMES[3:])]
    old = [weakref.ref(layer.weight_packed) for layers in groups for layer in layers]
    most, cat = [], torch.cat

    def count(*args: Any) -> Tensor:
        most.append(sum(tensor() is not None for tensor in old))
        return cat(*args)

    monkeypatch.setattr(torch, "cat", count)
    join(model)
    assert most == [15, 12, 12, 10, 10, 7, 7, 5, 5, 2, 2, 0]


@pytest.mark.parametrize("in_kernel_order", [False, True])
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=str)
def test_the_state_dict_stays_what_the_format_stores(scheme: Scheme, in_kernel_order: bool) -> None:
    block = Block(scheme, bias=True)
    expected = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    if in_kernel_order and scheme.symmetric:
        arrange(block)
    join(block)
    found = block.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_the_weight_of_a_joined_layer_can_be_looked_at() -> None:
    for one, other in zip(*attention(ASYMMETRIC), strict=True):
        assert torch.equal(one.weight, other.weight)


def replace_bias(layer: Int4Linear) -> None:
    layer.bias = nn.Parameter(torch.ones(layer.out_features), requires_grad=False)


def change_bias(layer: Int4Linear) -> None:
    with torch.no_grad():
        layer.bias.fill_(1)  # type: ignore[union-attr]


def lose_bias(layer: Int4Linear) -> None:
    layer.bias = None


def replace_scale(layer: Int4Linear) -> None:
    layer.weight_scale = layer.weight_scale * 2


def change_scale(layer: Int4Linear) -> None:
    layer.weight_scale.mul_(2)


def load_state(layer: Int4Linear) -> None:
    layer.load_state_dict(int4(32, bias=True, seed=5).state_dict())


def assign_state(layer: Int4Linear) -> None:
    layer.load_state_dict(int4(32, bias=True, seed=5).state_dict(), assign=True)


def restore(layer: Int4Linear) -> None:
    layer.restore()


def halve(layer: Int4Linear) -> None:
    layer.half()


TOUCHES = [replace_bias, change_bias, lose_bias, replace_scale, change_scale, load_state, assign_state, restore, halve]


@pytest.mark.parametrize("between", [True, False])
@pytest.mark.parametrize("touch", TOUCHES)
def test_a_touched_layer_and_its_siblings_stay_right(touch: Callable[[Int4Linear], None], between: bool) -> None:
    joined, single = attention(bias=True)
    if between:
        joined[0](X)
    touch(joined[1])
    touch(single[1])
    for _ in range(PATIENCE + 2):
        for i in (1, 2, 0):
            close(joined[i](X), single[i](X))


def test_buffers_that_are_swapped_for_a_call_count() -> None:
    joined, single = attention()
    scale = {"weight_scale": joined[1].weight_scale * 2}
    joined[0](X)
    close(torch.func.functional_call(joined[1], scale, (X,)), torch.func.functional_call(single[1], scale, (X,)))


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to("cpu"), lambda m: m.bfloat16().float()])
def test_a_moved_model_can_be_joined_again(move: Callable[[nn.Module], nn.Module]) -> None:
    block = Block(bias=True)
    single = copy.deepcopy(block)
    join(block)
    move(block)
    move(single)
    assert not any(layer.sibling for layer in layers_of(block))
    assert join(block) == 2
    x = X.to(block.get_submodule("q_proj").get_parameter("bias").dtype)
    torch.testing.assert_close(block(x), single(x), atol=1e-2, rtol=1e-2)


def through_torch(block: Block) -> Block:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    loaded: Block = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block)), through_torch])
@pytest.mark.parametrize("in_kernel_order", [False, True])
def test_a_copy_stands_for_itself(copied: Callable[[Block], Block], in_kernel_order: bool) -> None:
    block = Block(bias=True)
    expected = block(X)
    if in_kernel_order:
        arrange(block)
    join(block)
    block.q_proj(X)  # type: ignore[operator]  # a product that waits is not copied
    other = copied(block)
    for layer in layers_of(block):
        layer.weight_scale.zero_()
    close(other(X), expected)
    assert not any(layer.sibling for layer in layers_of(other))


@pytest.mark.parametrize("touch", [replace_bias, replace_scale])
def test_a_layer_with_other_tensors_can_be_joined_again(touch: Callable[[Int4Linear], None]) -> None:
    block = Block(bias=True)
    join(block)
    touch(layers_of(block)[1])
    assert [join(block), calls_of(lambda: block(X))] == [1, 4]


def test_buffers_that_were_swapped_for_a_call_do_not_part_siblings() -> None:
    joined, _ = attention()
    torch.func.functional_call(joined[1], {"weight_scale": joined[1].weight_scale * 2}, (X,))
    assert calls_of(lambda: [layer(X) for layer in joined]) == 1


# Siblings with inputs of their own


def test_siblings_that_share_no_input_part() -> None:
    joined, single = attention()
    for i in range(PATIENCE + 2):
        tokens, memory = X + i, X - i
        for one, other, x in zip(joined, single, (tokens, memory, memory), strict=True):
            close(one(x), other(x))
    assert not any(layer.sibling for layer in joined)
    assert calls_of(lambda: [layer(X) for layer in joined]) == 3


def test_siblings_that_share_their_input_forgive_a_lone_call() -> None:
    joined, _ = attention()
    for _ in range(PATIENCE + 2):
        joined[0](X)
        for layer in joined:
            layer(X)
    assert all(layer.sibling for layer in joined)


# Gradients


def test_gradients_reach_input_and_biases_of_joined_layers() -> None:
    joined, single = attention(ASYMMETRIC, bias=True)
    found = []
    for layers in (joined, single):
        x = X.clone().requires_grad_()
        for layer in layers:
            layer.requires_grad_()
        sum(((i + 1) * layer(x)).square().sum() for i, layer in enumerate(layers)).backward()
        found.append([x.grad, *(layer.bias.grad for layer in layers if layer.bias is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("of_bias", [True, False])
def test_a_product_without_gradients_does_not_serve_one_that_wants_them(of_bias: bool) -> None:
    joined, _ = attention(bias=True)
    x = X.clone()
    (joined[1].get_parameter("bias") if of_bias else x).requires_grad_()
    with torch.no_grad():
        joined[0](x)
    assert joined[1](x).requires_grad


# Threads


def test_threads_get_their_own_results() -> None:
    joined, single = attention()
    inputs = [X + i for i in range(8)]
    expected = [[layer(x) for layer in single] for x in inputs]

    def run(i: int) -> list[Tensor]:
        return [layer(inputs[i % 8]) for layer in joined]

    with ThreadPoolExecutor(4) as pool:
        for i, outputs in enumerate(pool.map(run, range(200))):
            for one, other in zip(outputs, expected[i % 8], strict=True):
                close(one, other)


def test_a_thread_takes_nothing_from_another() -> None:
    joined, _ = attention()
    mine = joined[0](X)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(joined[1], X).result()
    assert other.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr()


# torch.compile


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """Calls of the operator in each graph that `counting` has seen."""
    torch._dynamo.reset()
    counts: list[int] = []
    yield counts
    torch._dynamo.reset()


def counting(graphs: list[int]) -> Callable[..., Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(sum(node.target is int4_linear for node in graph.graph.nodes))
        return graph

    return backend


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_compiled_group_calls_the_operator_once(graphs: list[int], mode: Callable[[], Any]) -> None:
    block = Block(bias=True)
    expected = block(X)
    join(block)
    compiled = torch.compile(block, fullgraph=True, backend=counting(graphs))
    with mode():
        for _ in range(2):
            close(compiled(X), expected)
    assert graphs == [4]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.usefixtures("graphs")
def test_compiled_joined_layers_give_what_single_ones_give(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    block = Block(ASYMMETRIC, bias=True)
    expected = block(X)
    join(block)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    close(compiled(X), expected)
    close(compiled(X[:, :3]), block(X[:, :3]))


class Changing(nn.Module):
    """Changes its input between two siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = int4(32), int4(32, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        x[0] = 2
        x.mul_(2)
        return gate + self.up_proj(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("graphs")
def test_a_compiler_notices_a_change_in_place(backend: str) -> None:
    module = Changing()
    expected = module(X.clone())
    join(module)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for _ in range(PATIENCE + 2):
        close(compiled(X.clone()), expected)


def test_layers_of_one_kind_share_a_graph(graphs: list[int]) -> None:
    model = nn.ModuleList([Block() for _ in range(3)])
    join(model)
    backend = counting(graphs)
    for block in model:
        block.compile(fullgraph=True, backend=backend)
        block(X)
    assert graphs == [4]


@pytest.mark.usefixtures("graphs")
def test_gradients_flow_through_compiled_joined_layers() -> None:
    block = Block(bias=True)
    join(block)
    grads = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        x = X.clone().requires_grad_()
        call(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


# The flag


def layer_names(count: int) -> dict[str, Tensor]:
    return {f"layers.{i}.{name}.weight": random(16, 24, seed=i) for i in range(count) for name in NAMES}


class Tiny(nn.Module):
    """Fits `layer_names(1)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(24, 16, bias=False) for name in NAMES})])


@pytest.mark.parametrize(("flag", "joined"), [(True, True), (False, False), (None, False)])
def test_loading_joins_if_asked(tmp_path: Path, flag: bool | None, joined: bool) -> None:
    convert_folder(write_checkpoint(tmp_path / "source", layer_names(1)), tmp_path / "out")
    model = runtime.load_into(Tiny(), tmp_path / "out", device="cpu", join=flag)
    assert {layer.sibling is not None for layer in layers_of(model.layers[0])} == {joined}


def test_a_joined_module_can_be_loaded_again(tmp_path: Path) -> None:
    convert_folder(write_checkpoint(tmp_path / "source", layer_names(1)), tmp_path / "out")
    model = runtime.load_into(Tiny(), tmp_path / "out", device="cpu", join=True)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runtime.load_into(model, tmp_path / "out", device="cpu", join=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("flag", "joined"), [(True, True), (False, False), (None, False)])
def test_quantizing_joins_if_asked(flag: bool | None, joined: bool) -> None:
    model = runtime.quantize_(Tiny(), group_size=8, join=flag)
    assert {layer.sibling is not None for layer in layers_of(model.layers[0])} == {joined}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("example") / "out"
    convert_folder(EXAMPLE, out, Scheme(256))
    return out


def test_a_model_of_transformers_calls_the_operator_once_a_group(example: Path) -> None:
    tokens = torch.arange(40)[None]
    logits, counts = [], []
    for flag in (False, True):
        model = runtime.load(example, device="cpu", dtype=torch.float32, join=flag)
        with torch.inference_mode(), Calls() as calls:
            logits.append(model(input_ids=tokens).logits)
        counts.append(calls.count)
    assert counts == [21, 12]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_joined_logits_on_a_gpu_are_those_of_single_layers(tokens: int, bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=bias,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    runtime.quantize_(model, group_size=64, join=False)
    ids = torch.arange(tokens, device="cuda")[None] % 256
    with torch.no_grad():
        single = model(input_ids=ids).logits.float()
        assert join(model, gpu_only=True) == 4
        joined = model(input_ids=ids).logits.float()
    assert calls_of(lambda: model(input_ids=ids)) == 8  # without gradients they pass the dispatcher by
    assert ((joined - single).norm() / single.norm()).item() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_joined_layer_works_alone_on_a_gpu(tokens: int) -> None:
    single = nn.ModuleDict({"gate_proj": int4(64, 128, Scheme(64), dtype=torch.bfloat16),
                            "up_proj": int4(32, 128, Scheme(64), dtype=torch.bfloat16)}).cuda()  # fmt: skip
    joined = copy.deepcopy(single)
    assert join(joined) == 1
    x = random(tokens, 128).cuda().requires_grad_()  # each then computes for itself, from a slice of the scales
    for name in single:
        assert torch.equal(joined[name](x), single[name](x))
