"""What the benchmarks count, check and write; their clocks stand still here."""

import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

import blocks
import limits
import model
import peers
import quantize
import random_checkpoint
import schemes
import tables
import timing
import tune
from products import operands

from formats import codec
from formats.codec import Quantized
from formats.layout import Scheme
from runtime.kernels.hopper import KERNELS
from runtime.kernels.hopper_choice import Table, entry_of

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}  # fmt: skip
TINY_WEIGHTS = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 64 * 128 * 3)
TINY_HEAD = 500 * 64


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel takes ten microseconds, on operands with two copies."""

    def ten(calls: list[Callable[[], object]]) -> float:
        calls[-1]()
        return 10.0

    for module in (quantize, blocks, tune, peers):
        monkeypatch.setattr(module, "graph_time", ten, raising=False)
        monkeypatch.setattr(module, "copies_for", lambda nbytes: 2, raising=False)


def test_operations_of_a_product() -> None:
    assert limits.operations(2, 3, 5) == 60


def test_bytes_of_a_product_in_bf16() -> None:
    assert limits.bf16_bytes(2, 3, 5) == 30 + 20 + 12


@pytest.mark.parametrize(("group", "scales"), [(128, 16 * 2 * 2), (-1, 16 * 2)])
def test_bytes_of_a_product_in_int4(group: int, scales: int) -> None:
    assert limits.int4_bytes(2, 16, 256, group) == 16 * 128 + scales + 2 * 2 * 256 + 2 * 2 * 16


@pytest.mark.parametrize(("nbytes", "operations"), [(8.5e6, 0), (0, 1.58e9), (8.5e6, 1e9)])
def test_the_limit_is_the_slower_of_memory_and_arithmetic(nbytes: int, operations: int) -> None:
    assert limits.least_us(nbytes, operations) == pytest.approx(2)


def test_cells_stand_under_their_titles() -> None:
    columns = {"one": 4, "two": 5}
    assert tables.line(columns) == " one   two"
    assert tables.line(columns, [1]) == "   1"


def test_records_are_written_a_line_each(tmp_path: Path) -> None:
    records = [{"a": 1}, {"a": None}]
    tables.write(tmp_path / "rows.json", records)
    text = (tmp_path / "rows.json").read_text()
    assert json.loads(text) == records
    assert len(text.splitlines()) == 4


def test_calls_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    order = ""

    def call(name: str, first: float, later: float) -> None:
        nonlocal now, order
        now += later if name in order else first
        order += name

    monkeypatch.setattr(timing, "perf_counter", lambda: now)
    times = timing.alternate({"a": lambda: call("a", 100, 2), "b": lambda: call("b", 100, 3)})
    assert order == "ab" * (timing.ROUNDS + 1)
    assert times == {"a": 2, "b": 3}


@cpu_only
@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(("symmetric", "zeros"), [(True, 0), (False, 4 * 4 * 2)])
def test_quantisation_moves_the_weight_and_what_is_made_of_it(symmetric: bool, zeros: int) -> None:
    row = quantize.measure_method("absmax", 32, 256, Scheme(128, symmetric), "cpu")
    assert row.right
    assert row.nbytes == 32 * 256 * 2 + 32 * 128 + 32 * 2 * 2 + zeros


@cpu_only
@pytest.mark.usefixtures("still")
def test_repacking_reads_and_writes_words_and_scales() -> None:
    rows = list(quantize.measure_repack(32, 256, "cpu"))
    assert [row.work for row in rows] == ["arrange", "restore"]
    assert all(row.right for row in rows)
    assert all(row.nbytes == 2 * (32 * 128 + 32 * 2 * 2) for row in rows)


def test_one_bit_makes_a_result_wrong() -> None:
    _, matrix, _ = operands(1, 8, 64, Scheme(64), torch.bfloat16, "cpu")
    other = Quantized(matrix.packed ^ torch.eye(8, dtype=torch.int32), matrix.scale, None)
    assert quantize.same(matrix, matrix)
    assert not quantize.same(matrix, other)


def test_a_wrong_quantisation_has_no_speed() -> None:
    row = quantize.Row("absmax", 32, 256, 128, True, 12.5, 1000, False, 77.5, 990.0)
    line = quantize.line(row, 100)
    assert "WRONG" in line
    assert not any(figure in line for figure in ("12.5", "77.5", "990"))


def test_the_row_of_a_quantisation_for_programs() -> None:
    record = quantize.Row("absmax", 32, 256, 128, True, 10.0, 20_000, True).record(4.0)
    assert record["gb_s"] == 2
    assert record["percent_of_copy"] == 50


@pytest.mark.parametrize("shape", tune.SHAPES, ids=str)
@pytest.mark.parametrize("tokens", tune.TOKENS)
def test_every_size_has_candidates(tokens: int, shape: tuple[int, int]) -> None:
    assert list(tune.candidates(tokens, *shape))


@pytest.mark.parametrize("shape", tune.SHAPES, ids=str)
@pytest.mark.parametrize("tokens", tune.TOKENS)
def test_every_candidate_can_be_launched(tokens: int, shape: tuple[int, int]) -> None:
    for kernel, options in tune.candidates(tokens, *shape):
        assert kernel in KERNELS
        assert options.get("splits", 1) <= shape[1] // 64


@pytest.mark.parametrize("shape", tune.SHAPES, ids=str)
@pytest.mark.parametrize("tokens", tune.TOKENS)
def test_no_candidate_is_tried_twice(tokens: int, shape: tuple[int, int]) -> None:
    tried = [(kernel, *sorted(options.items())) for kernel, options in tune.candidates(tokens, *shape)]
    assert len(set(tried)) == len(tried)


def test_the_fastest_is_right() -> None:
    tried = [{"kernel": "a", "us": None}, {"kernel": "b", "us": 3.0}, {"kernel": "c", "us": 2.0}]
    assert tune.fastest(tried)["kernel"] == "c"


def test_a_fit_has_no_term_below_0() -> None:
    a, b = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), torch.tensor([4.0, 6.0, 8.0])
    assert torch.allclose(tune.nonnegative(a, b), torch.tensor([2.0, 2.0]), atol=1e-3)
    assert torch.allclose(tune.nonnegative(a, b - 4), torch.tensor([0.0, 16 / 14]), atol=1e-3)


def test_a_table_estimates_the_times_that_it_was_made_of(tmp_path: Path) -> None:
    """Of two kinds, one of which wins nowhere."""
    options = {"tokens": 64, "splits": 1, "raster": 8, "step": 4, "buffers": 2}
    rows = []
    for columns in (2048, 4096, 8192):
        for warps, us in ((4, 1), (8, 9)):
            trial = tune.Trial("batch", {"warps": warps, **options}, 2 + us * columns / 256)
            rows.append(tune.row_of((64, 64 * 132, columns, "bf16"), trial))
    tune.write(tmp_path / "table.json", rows)
    raw = json.loads((tmp_path / "table.json").read_text())
    table = Table(tuple(map(entry_of, raw["entries"])), raw["us"])
    assert {entry.choice.options["warps"] for entry in table.entries} == {4}
    for entry in table.entries:
        assert table.estimate(entry.size, entry.choice) == pytest.approx(2 + entry.size.columns / 256, rel=1e-3)
    assert not any("warps=8" in name for name in table.us)


@cpu_only
@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_portable_blocks_make_right_products(tokens: int) -> None:
    from products import relative_error

    x, matrix, _ = operands(tokens, 72, 256, Scheme(128), torch.float16, "cpu")
    candidates = list(blocks.portable_candidates(tokens))
    assert candidates
    for kernel, options in candidates:
        y = blocks.PORTABLE[kernel](x, matrix, None, Scheme(128), **options)
        assert relative_error(y, x, matrix, None, Scheme(128)) <= blocks.MAX_ERROR


@cpu_only
@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("group", [128, -1])
def test_tiles_of_the_converter_make_right_bits(group: int) -> None:
    trials = list(blocks.quantize_trials(quantize.random_weight(9, 264, "cpu"), Scheme(group)))
    assert len(trials) == 8
    assert all(trial.us == 10 for trial in trials)


def test_schemes_measure_what_the_codec_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schemes.THEIRS, (16, 64), {(8, True): (0.055, 2.0)})
    rows = list(schemes.measure(16, 64, torch.randn(16, 64, generator=torch.Generator().manual_seed(0))))
    assert len(rows) == 2 * len(schemes.SCHEMES)
    eight = {row.method: row for row in rows if row.group == 8}
    assert eight["search"].mse < eight["absmax"].mse
    assert eight["search"].compression == 16 / 6
    assert eight["search"].better


@pytest.mark.parametrize(("mae", "compression"), [(0.1, 4.0), (0.09, 3.8)])
def test_a_scheme_is_not_better_that_loses_as_much_or_is_larger(mae: float, compression: float) -> None:
    assert not schemes.Row(8, 8, 8, True, "search", mae, 0.0, compression, 0.1, 3.9).better


def test_wrong_results_stand_last_without_time() -> None:
    tried = [tune.Trial("a", {"rows": 1}, None), tune.Trial("b", {"rows": 2}, 4.0), tune.Trial("c", {}, 2.0)]
    table = blocks.table(64, 128, 1, 128, 10_000, tried)
    *_, first, second, third = table.lines()
    assert first.split() == ["2.0", "100", "0", "5", "c:"]
    assert second.split() == ["4.0", "50", "0", "2", "b:", "rows", "2"]
    assert third.split() == ["WRONG", "a:", "rows", "1"]


def test_the_rows_of_a_table_for_programs() -> None:
    (record,) = blocks.table(64, 128, 1, 32, 10_000, [tune.Trial("a", {"rows": 1}, 2.345)]).records
    assert record == {"n": 64, "k": 128, "m": 1, "group": 32, "kernel": "a", "options": {"rows": 1}, "us": 2.35}


def right(quantized: Quantized, columns: int, scheme: Scheme) -> peers.Product:
    weight = codec.dequantize(quantized, columns, scheme, torch.bfloat16)
    return lambda x: x @ weight.T


def wrong(quantized: Quantized, columns: int, scheme: Scheme) -> peers.Product:
    product = right(quantized, columns, scheme)
    return lambda x: product(x) * 1.1


def absent(quantized: Quantized, columns: int, scheme: Scheme) -> peers.Product:
    raise ImportError


def refusing(quantized: Quantized, columns: int, scheme: Scheme) -> peers.Product:
    raise RuntimeError("not this size")


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    ("peer", "times"),
    [(right, {"it": 10}), (wrong, {}), (absent, {}), (refusing, {})],
    ids=["right", "wrong", "absent", "refusing"],
)
def test_only_a_right_peer_has_a_time(monkeypatch: pytest.MonkeyPatch, peer: Any, times: dict[str, float]) -> None:
    monkeypatch.setattr(peers, "PEERS", {"it": peer})
    assert peers.measure(4, 64, 256, Scheme(128), "cpu") == times


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_tinygemm_is_a_right_peer(tokens: int) -> None:
    assert peers.measure(tokens, 256, 1024, Scheme(128)).keys() >= {"tinygemm"}


@pytest.mark.gpu
def test_a_graph_gives_its_result_anew() -> None:
    x = torch.ones(8, device="cuda")
    captured = timing.Captured(lambda: x * 2)
    assert torch.equal(captured(), x * 2)
    x.fill_(3)
    assert torch.equal(captured(), x * 2)


@pytest.mark.gpu
def test_a_graph_keeps_the_tensors_of_its_call() -> None:
    x = torch.ones(8, device="cuda")
    alive = weakref.ref(x)
    captured = timing.Captured(partial(torch.mul, x, 2))
    del x
    assert alive() is not None
    assert captured().sum() == 16


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sizes of the model are tiny, and so is what it is given."""
    pytest.importorskip("transformers")
    for name, value in (("vocab_size", 500), ("bos_token_id", 1), ("eos_token_id", 2)):
        monkeypatch.setitem(random_checkpoint.COMMON, name, value)
    for size in random_checkpoint.SIZES:
        monkeypatch.setitem(random_checkpoint.SIZES, size, TINY)
    monkeypatch.setattr(model, "PREFILL", ((2, 8),))
    monkeypatch.setattr(model, "BATCH", ((3, 4),))
    monkeypatch.setattr(model, "STEPS", 2)
    monkeypatch.setattr(model, "CALLS", 2)


@pytest.fixture
def four(tiny: None) -> model.Models:
    bf16 = model.build("1b", "cpu")
    int4 = model.int4_of(bf16, 64, "bf16")
    return model.Models(bf16, int4, model.unpacked(int4, torch.float32), model.unpacked(int4, torch.bfloat16))


def test_random_weights_are_as_they_should_be(four: model.Models) -> None:
    for name, parameter in four.bf16.named_parameters():
        deviation = parameter.float().std().item()
        assert deviation == (0 if "norm" in name else pytest.approx(0.02, rel=0.1)), name
        assert parameter.dtype == torch.bfloat16


def test_operations_of_a_model(four: model.Models) -> None:
    assert model.flops(four.int4, 3, 5) == 2 * 3 * (5 * TINY_WEIGHTS + TINY_HEAD)


def test_bytes_that_a_forward_pass_reads(four: model.Models) -> None:
    assert model.nbytes(four.bf16) == 2 * (TINY_WEIGHTS + TINY_HEAD)
    assert model.nbytes(four.int4) == TINY_WEIGHTS // 2 + TINY_WEIGHTS // 64 * 2 + 2 * TINY_HEAD


@torch.no_grad()
def test_the_yardstick_has_the_weights_of_the_int4_model(four: model.Models) -> None:
    ids = model.random_ids(four.int4, 2, 6)
    assert torch.equal(model.forward(four.rounded, ids), model.forward(four.int4, ids))
    assert not any(isinstance(layer, model.Int4Linear) for layer in four.rounded.modules())


@torch.no_grad()
def test_the_exact_model_has_the_weights_of_the_int4_model_in_fp32(four: model.Models) -> None:
    path = "model.layers.0.mlp.up_proj"
    wanted = four.int4.get_submodule(path).dequantize(torch.float32)
    assert torch.equal(four.exact.get_submodule(path).weight, wanted)
    assert {parameter.dtype for parameter in four.exact.parameters()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("section", ["prefill", "decode"])
def test_a_wrong_layer_shows(four: model.Models, section: str) -> None:
    four.int4.model.layers[1].mlp.up_proj.weight_scale *= 1.5
    rows = model.measure_decode(four, 2) if section == "decode" else model.measure_forward(four, section, 2, 8)
    assert not any(row.right(model.MAX_ERROR["bf16"]) for row in rows)


@pytest.mark.parametrize("error", [float("nan"), 0.3])
def test_a_wrong_model_has_no_speed(error: float) -> None:
    row = model.Row("decode", "graph", 4, 1, "ms", 3.0, 2.0, rel_error=error, yardstick=0.1, flops=10**9, nbytes=10**9)
    figures = ["3.000", "ms", "WRONG", f"{error:.1e}", "1.0e-01"]
    assert model.line(row, 2).split() == ["decode", "graph", "4", "1", *figures]


def test_a_right_model_has_its_speed() -> None:
    row = model.Row("decode", "graph", 4, 1, "ms", 4.0, 2.0, rel_error=0.1, yardstick=0.1, flops=10**12, nbytes=10**9)
    figures = ["4.000", "2.000", "ms", "2.00", "1000", "2000", "500", "500", "1.0e-01", "1.0e-01"]
    assert model.line(row, 2).split() == ["decode", "graph", "4", "1", *figures]


@torch.no_grad()
def test_decoding_is_that_of_generate(four: model.Models) -> None:
    four.bf16.float()  # no near ties
    prompt = model.random_ids(four.bf16, 2, 9)
    wanted = four.bf16.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)[:, 9:]
    decoder = model.Decoder(four.bf16, prompt[:, :-1], compiled=False)
    decoder.token.copy_(prompt[:, -1:])
    found = []
    for _ in range(4):
        decoder.step()
        found.append(decoder.token.clone())
    assert torch.equal(torch.cat(found, 1), wanted)


@torch.no_grad()
def test_packed_attention_is_that_of_transformers(four: model.Models) -> None:
    four.bf16.float()
    prompt = model.random_ids(four.bf16, 2, 9)
    logits = []
    for attention in ("sdpa", model.PACKED):
        four.bf16.set_attn_implementation(attention)
        decoder = model.Decoder(four.bf16, prompt[:, :-1], compiled=False)
        decoder.token.copy_(prompt[:, -1:])
        logits.append(decoder.step())
    torch.testing.assert_close(*logits)


def test_decoding_stays_inside_its_cache() -> None:
    checked = 2
    assert model.PROMPT + checked + model.STEPS * (timing.ROUNDS + 1) <= model.CACHE


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("device", "modes"),
    [("cpu", ["eager"]), pytest.param("cuda", ["eager", "graph"], marks=pytest.mark.gpu)],
)
def test_the_command_writes_a_row_a_quantity(tmp_path: Path, device: str, modes: list[str]) -> None:
    arguments = ["--size", "8b", "--group-size", "64", "--device", device, "--json", str(tmp_path / "rows.json")]
    done = CliRunner().invoke(model.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    sections = [("prefill", 2, 8), ("batch", 3, 4), ("decode", 1, 1), ("decode", 16, 1)]
    timed = [(section, mode, batch, tokens) for section, batch, tokens in sections for mode in modes]
    expected = [("weights", "", 0, 0), *timed, ("host", "eager", 1, 1)]
    assert [(row["section"], row["mode"], row["batch"], row["tokens"]) for row in rows] == expected
    assert all(row["ratio"] == pytest.approx(row["bf16"] / row["int4"], rel=0.05) for row in rows)


@pytest.mark.usefixtures("tiny")
def test_an_unknown_section_is_refused() -> None:
    done = CliRunner().invoke(model.main, ["--device", "cpu", "--only", "prefil"])
    assert done.exit_code == 2


PRODUCT = {"n": 64, "k": 128, "m": 16, "group": 128, "activations": "bf16", "us": 2.0, "cublas_us": 3.0, "ratio": 1.5,
           "rel_error": 0.002, "kernel": "batch", "peers": {"tinygemm": 6.0}}  # fmt: skip
QUANTITY = {"size": "1b", "group": 128, "activations": "bf16", "section": "decode", "mode": "graph", "batch": 16,
            "tokens": 1, "unit": "ms", "bf16": 3.0, "int4": 2.0, "ratio": 1.5}  # fmt: skip


def test_pictures_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    (tmp_path / "matmul.json").write_text(json.dumps([PRODUCT, {**PRODUCT, "m": 2048, "peers": {}}]))
    (tmp_path / "model.json").write_text(json.dumps([QUANTITY, {**QUANTITY, "size": "8b"}]))
    files = [str(tmp_path / name) for name in ("matmul.json", "model.json")]
    done = CliRunner().invoke(plots.main, [str(tmp_path / "out"), *files], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert pictures.keys() == {"roofline.png", "speedup.png", "model.png"}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    (tmp_path / "rows.json").write_text("[]")
    done = CliRunner().invoke(plots.main, [str(tmp_path), str(tmp_path / "rows.json")])
    assert done.exit_code == 2


def test_points_of_the_pictures() -> None:
    pytest.importorskip("matplotlib")
    import plots

    ours = "int4, G = 128, bf16 activations"
    assert plots.speedup(PRODUCT) == {ours: 1.5, "tinygemm": 0.5}
    nbytes = 64 * 64 + 64 * 2 + 2 * 16 * 192
    assert plots.percent_of_limit(PRODUCT)[ours] == pytest.approx(100 * nbytes / 4.25e12 * 1e6 / 2)
