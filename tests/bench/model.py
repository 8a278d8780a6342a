"""A Hugging Face Llama with int4 layers against the same in bf16: logits checked first, then time, alternating.

Logits are right if they are as near to those of the same weights in fp32 as bf16 layers with these weights come.

Random weights in the public shapes, SDPA attention, logits of the last position only, as `generate` asks for them.
`eager` is transformers as it comes; `graph` is the same kernels as a CUDA graph, without the host's part; `compile` is
torch.compile(mode="reduce-overhead"), as transformers advises for a static cache.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/model.py [--size 8b] [--only prefill,decode] [--json FILE]
"""

import copy
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import tables
import torch
from products import distance
from random_checkpoint import COMMON, SIZES
from timing import Captured, alternate
from torch import Tensor, nn

import runtime
from runtime import Int4Linear
from runtime.evaluate import weight_bytes

SECTIONS = ("prefill", "batch", "decode", "host")
MODES = ("eager", "graph")
PREFILL = ((4, 256), (1, 2048))  # sequences × tokens
BATCH = ((16, 128), (16, 512), (16, 2048))
DECODE = (1, 16)  # sequences
PROMPT, CACHE = 128, 512
STEPS = 32  # of decoding, between two looks at the clock
CALLS = 200  # of a layer, for the host's time
# Of the logits, by activations: times what layers in bf16 with the same weights have. e4m3 rounds 16 times as coarsely.
MAX_ERROR = {"bf16": 1.25, "fp8": 1.25 * 16}
UNMASKED, PACKED = "unmasked_sdpa", "packed_sdpa"


@dataclass(frozen=True)
class Models:
    """A model in bf16 and its int4 form; with the int4 form's weights, one in fp32 and one in bf16 as the yardstick."""

    bf16: Any
    int4: Any
    exact: Any
    rounded: Any


@dataclass(frozen=True)
class Row:
    """One quantity of the bf16 model and of the int4 one, less being better; flops and bytes are the int4 model's.

    The error of the int4 model's logits against the exact ones goes with `yardstick`, that of bf16 layers.
    """

    section: str
    mode: str
    batch: int
    tokens: int
    unit: str
    bf16: float
    int4: float
    rel_error: float | None = None
    yardstick: float = 0.0
    flops: int = 0
    nbytes: int = 0

    @property
    def ratio(self) -> float:
        """How many times better int4 is."""
        return self.bf16 / self.int4

    def right(self, limit: float) -> bool:
        """Whether the error, if there is one, is at most `limit` times that of bf16 layers."""
        return self.rel_error is None or self.rel_error <= limit * self.yardstick

    def tokens_per_second(self, milliseconds: float) -> float:
        """Tokens that come out of `batch` sequences in that time."""
        return 1e3 * self.batch * self.tokens / milliseconds

    def record(self) -> dict[str, Any]:
        """The row for programs."""
        rounded = {"bf16": round(self.bf16, 4), "int4": round(self.int4, 4), "ratio": round(self.ratio, 3)}
        return {**asdict(self), **rounded}


def build(size: str, device: str) -> Any:
    """A Llama in bf16 with weights from N(0, 0.02²), in evaluation mode."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    # While a graph is captured transformers would make a mask, and flash attention takes none.
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**COMMON, **SIZES[size])
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=PACKED)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA that for one new token reads the cache as it is, as newer transformers do, with no copy for every head.

    The heads [batch, heads, 1, width] that share keys are rows of one head.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, tokens, width = query.shape
    if tokens > 1:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
        return found
    packed = query.view(batch, key.shape[1], heads // key.shape[1], width)
    y = nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=options["scaling"])
    return y.reshape(batch, 1, heads, width), None


def int4_of(model: nn.Module, group_size: int, activations: str) -> nn.Module:
    """A copy of `model` with int4 layers."""
    options = {} if activations == "bf16" else {"activations": activations}
    return runtime.quantize_(copy.deepcopy(model), group_size, **options)


def unpacked(int4: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `int4` as `dtype` with torch's linear layers of the same weights."""
    model = copy.deepcopy(int4)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Int4Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight, linear.bias = nn.Parameter(layer.dequantize(dtype)), layer.bias
            model.set_submodule(path, linear)
    for parameter in model.parameters():  # buffers keep their type: rotary frequencies are fp32
        parameter.data = parameter.data.to(dtype)
    return model


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights a forward pass reads in full; the last is the head."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear | Int4Linear)}


def flops(model: nn.Module, batch: int, tokens: int) -> int:
    """Operations of the linear layers in a forward pass: the head sees one token of a sequence."""
    sizes = {path: layer.in_features * layer.out_features for path, layer in linears(model).items()}
    head = sizes.pop("lm_head")
    return 2 * batch * (tokens * sum(sizes.values()) + head)


def nbytes(model: nn.Module) -> int:
    """Bytes of the weights that a forward pass reads, whatever its batch."""
    return sum(weight_bytes(layer) for layer in linears(model).values())


def random_ids(model: Any, batch: int, tokens: int) -> Tensor:
    """Token ids [batch, tokens]."""
    return torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)


def available(modes: Collection[str], device: str) -> list[str]:
    """Those of `modes` that there are on a device."""
    return [mode for mode in modes if mode != "graph" or device == "cuda"]


def forward(model: Any, ids: Tensor) -> Tensor:
    """Logits [batch, 1, vocabulary] of the last position, without a cache."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
    return logits


def measure_forward(
    models: Models, section: str, batch: int, tokens: int, modes: Collection[str] = MODES
) -> Iterator[Row]:
    """Milliseconds of a forward pass."""
    ids = random_ids(models.bf16, batch, tokens)
    for model in vars(models).values():
        model.set_attn_implementation(UNMASKED)
    exact = forward(models.exact, ids)
    yardstick = distance(forward(models.rounded, ids), exact)
    for mode in available([mode for mode in modes if mode in MODES], ids.device.type):
        calls: dict[str, Callable[[], Any]] = {
            "bf16": partial(forward, models.bf16, ids),
            "int4": partial(forward, models.int4, ids),
        }
        if mode == "graph":
            calls = {name: Captured(call) for name, call in calls.items()}
        error = distance(calls["int4"](), exact)
        times = {name: 1e3 * seconds for name, seconds in alternate(calls).items()}
        yield Row(section, mode, batch, tokens, "ms", **times, rel_error=error, yardstick=yardstick,
                  flops=flops(models.int4, batch, tokens), nbytes=nbytes(models.int4))  # fmt: skip


class Decoder:
    """Greedy decoding over a static cache that holds a prompt: its keys, values and length stay at their addresses."""

    def __init__(self, model: Any, prompt: Tensor, *, compiled: bool) -> None:
        from transformers import StaticCache

        self.model = torch.compile(model, mode="reduce-overhead", dynamic=False) if compiled else model
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        self.token = prompt[:, -1:].clone()
        model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def step(self) -> Tensor:
        """Logits [batch, 1, vocabulary] of the next token, which becomes the last."""
        logits: Tensor = self.model(self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        return logits


def decoding(model: Any, prompt: Tensor, mode: str) -> tuple[Callable[[], Any], Tensor]:
    """A step of decoding, ready to be timed, and the logits of the second after the prompt, whose token is given."""
    decoder = Decoder(model, prompt, compiled=mode == "compile")
    step: Callable[[], Any] = decoder.step
    if mode == "graph":
        step = Captured(step)
    else:
        step()
    decoder.token.copy_(prompt[:, :1])  # the first choice may differ: random weights make near ties
    return step, step().clone()


def many(step: Callable[[], Any]) -> None:
    """STEPS steps."""
    for _ in range(STEPS):
        step()


def measure_decode(models: Models, batch: int, modes: Collection[str] = MODES) -> Iterator[Row]:
    """Milliseconds of a step of decoding."""
    prompt = random_ids(models.bf16, batch, PROMPT)
    for model in vars(models).values():
        model.set_attn_implementation(PACKED)
    _, exact = decoding(models.exact, prompt, "eager")
    yardstick = distance(decoding(models.rounded, prompt, "eager")[1], exact)
    for mode in available(modes, prompt.device.type):
        bf16, _ = decoding(models.bf16, prompt, mode)
        int4, logits = decoding(models.int4, prompt, mode)
        seconds = alternate({"bf16": partial(many, bf16), "int4": partial(many, int4)})
        times = {name: 1e3 * taken / STEPS for name, taken in seconds.items()}
        yield Row("decode", mode, batch, 1, "ms", **times, rel_error=distance(logits, exact), yardstick=yardstick,
                  flops=flops(models.int4, batch, 1), nbytes=nbytes(models.int4))  # fmt: skip


def measure_host(models: Models) -> Row:
    """Microseconds that the host spends on a call of the first linear layer, on its own, with one token."""
    layers = {name: copy.deepcopy(model.model.layers[0].self_attn.q_proj) for name, model in vars(models).items()}
    x = torch.randn(1, 1, models.bf16.config.hidden_size, dtype=torch.bfloat16, device=models.bf16.device)

    def calls(layer: nn.Module) -> None:
        for _ in range(CALLS):
            layer(x)

    seconds = alternate({name: partial(calls, layers[name]) for name in ("bf16", "int4")}, until_done=False)
    times = {name: 1e6 * taken / CALLS for name, taken in seconds.items()}
    exact = layers["exact"](x.float())
    error, yardstick = distance(layers["int4"](x), exact), distance(layers["rounded"](x), exact)
    return Row("host", "eager", 1, 1, "us", **times, rel_error=error, yardstick=yardstick)


def measure_weights(models: Models) -> Row:
    """Megabytes of parameters and buffers."""
    return Row("weights", "", 0, 0, "MB", weight_bytes(models.bf16) / 1e6, weight_bytes(models.int4) / 1e6)


def measure(models: Models, sections: Collection[str], modes: Collection[str]) -> Iterator[Row]:
    """Every row of `sections` in those of `modes` that they have."""
    yield measure_weights(models)
    for section, sizes in (("prefill", PREFILL), ("batch", BATCH)):
        if section in sections:
            for batch, tokens in sizes:
                yield from measure_forward(models, section, batch, tokens, modes)
    if "decode" in sections:
        for batch in DECODE:
            yield from measure_decode(models, batch, modes)
    if "host" in sections:
        yield measure_host(models)


COLUMNS = {
    "section": 7, "mode": 7, "batch": 5, "tokens": 6, "bf16": 10, "int4": 10, "unit": 4, "ratio": 6,
    "bf16 tok/s": 10, "int4 tok/s": 10, "TFLOP/s": 7, "GB/s": 5, "error": 8, "in bf16": 8,
}  # fmt: skip


def line(row: Row, limit: float) -> str:
    """The row for people, without the speed of a wrong result."""
    right = row.right(limit)
    cells = [row.section, row.mode, row.batch or "", row.tokens or "", f"{row.bf16:.3f}",
             f"{row.int4:.3f}" if right else "", row.unit, f"{row.ratio:.2f}" if right else "WRONG"]  # fmt: skip
    if row.flops and right:
        cells += [f"{row.tokens_per_second(milliseconds):.0f}" for milliseconds in (row.bf16, row.int4)]
        cells += [f"{row.flops / row.int4 / 1e9:.0f}", f"{row.nbytes / row.int4 / 1e6:.0f}"]
    else:
        cells += [""] * 4
    cells += ["", ""] if row.rel_error is None else [f"{row.rel_error:.1e}", f"{row.yardstick:.1e}"]
    return tables.line(COLUMNS, cells)


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(sorted(SIZES)), default="1b", show_default=True)
@click.option("--group-size", default=128, show_default=True)
@click.option("--activations", type=click.Choice(list(MAX_ERROR)), default="bf16", show_default=True)
@click.option("--only", default=",".join(SECTIONS), show_default=True)
@click.option("--modes", default=",".join(MODES), show_default=True, help="Also: compile, for decoding (slow).")
@click.option("--device", default="cuda", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
@torch.no_grad()
def main(
    size: str, group_size: int, activations: str, only: str, modes: str, device: str, json_file: Path | None
) -> None:  # fmt: skip
    """Print a row a quantity; exit with 1 if logits are wrong."""
    sections = only.split(",")
    if not {*sections} <= {*SECTIONS}:
        raise click.UsageError(f"--only {only}: there are {', '.join(SECTIONS)}")
    if not {*modes.split(",")} <= {*MODES, "compile"}:
        raise click.UsageError(f"--modes {modes}: there are {', '.join(MODES)}, compile")
    bf16 = build(size, device)
    int4 = int4_of(bf16, group_size, activations)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{name}, torch {torch.__version__}, {size}, G = {group_size}, {activations} activations, last logits only")
    print(tables.line(COLUMNS))
    rows = []
    models = Models(bf16, int4, unpacked(int4, torch.float32), unpacked(int4, torch.bfloat16))
    about = {"size": size, "group": group_size, "activations": activations}
    for row in measure(models, sections, modes.split(",")):
        rows.append(row)
        print(line(row, MAX_ERROR[activations]), flush=True)
        tables.write(json_file, ({**about, **row.record()} for row in rows))
    sys.exit(not all(row.right(MAX_ERROR[activations]) for row in rows))


if __name__ == "__main__":
    main()
