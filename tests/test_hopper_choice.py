import pytest

from runtime.kernels import hopper_choice
from runtime.kernels.hopper_choice import Choice, Entry, Size, bucket, choose

KERNELS = {"decode", "batch", "prefill", "fp8"}
DECODE = Choice("decode", {"rows": 32, "tokens": 8, "warps": 4, "splits": 2, "step": 2, "buffers": 2})
BATCH = Choice("batch", {"tokens": 64, "warps": 4, "splits": 1, "raster": 8, "step": 2, "buffers": 3})
PREFILL = Choice(
    "prefill", {"rows": 128, "tokens": 256, "programs": 1, "splits": 1, "raster": 4, "step": 1, "buffers": 4}
)


def test_a_measured_size_has_its_own_choice() -> None:
    for entry in hopper_choice.table():
        size = entry.size
        found = choose(size.tokens, size.rows, size.columns, size.activations)
        assert found == (entry.choice.kernel, entry.choice.options)


@pytest.mark.parametrize(
    ("tokens", "shared"), [(1, 1), (2, 8), (8, 8), (9, 16), (17, 32), (33, 48), (49, 64), (65, 96), (97, 128),
                           (1025, 1536), (1537, 2048)]
)  # fmt: skip
def test_few_choices_serve_all_numbers_of_tokens(tokens: int, shared: int) -> None:
    assert bucket(tokens) == shared


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 33, 65, 129, 513, 3000, 100_000])
@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (1536, 8960), (2048, 2048), (128256, 4096)])
def test_every_size_has_a_choice_that_the_kernels_take(tokens: int, shape: tuple[int, int]) -> None:
    kernel, options = choose(tokens, *shape)
    assert kernel in KERNELS
    assert options.get("splits", 1) <= max(1, shape[1] // (64 * options.get("step", 1)))
    assert kernel != "decode" or tokens <= options["tokens"]


def test_fp8_has_a_kernel_of_its_own() -> None:
    assert choose(5000, 3072, 3072, "fp8")[0] == "fp8"


def test_decode_is_not_chosen_for_more_tokens_than_it_takes() -> None:
    assert DECODE.takes(Size("bf16", 8, 64, 4096))
    assert not DECODE.takes(Size("bf16", 9, 64, 4096))


def test_every_part_of_k_has_a_step() -> None:
    assert DECODE.takes(Size("bf16", 8, 64, 2 * 2 * 4 * 64))
    assert not DECODE.takes(Size("bf16", 8, 64, 2 * 2 * 4 * 64 - 8))


def test_a_round_has_as_many_programs_as_run_at_once() -> None:
    slot = 2 * (64 * 128 + 64 * 34)  # bytes of two blocks of tokens, and of words and scales
    assert BATCH.programs == 132 * (227 * 1024 // (3 * slot))
    assert PREFILL.programs == 132


@pytest.mark.parametrize(("rows", "rounds"), [(128, 1), (128 * 132, 1), (128 * 133, 2), (128 * 264, 2)])
def test_an_estimate_counts_rounds(rows: int, rounds: int) -> None:
    assert PREFILL.estimate(Size("bf16", 256, rows, 6400), 0.5) == 2.5 + rounds * 50


def test_prefill_splits_the_tiles_of_the_last_round_only() -> None:
    halves = Choice("prefill", {**PREFILL.options, "splits": 2})
    sums = 8 * 2 * 128 * 256 / 4e6
    assert halves.estimate(Size("bf16", 256, 128 * 133, 6400), 0.5) == pytest.approx(2.5 + 75 + 1.5 + sums)


def test_a_step_is_taken_whole() -> None:
    assert BATCH.estimate(Size("bf16", 64, 64, 9 * 64), 0.5) == 2.5 + 10 * 0.5


def test_decode_takes_as_long_as_its_bytes() -> None:
    one = Choice("decode", {**DECODE.options, "splits": 1})
    us = 1000 * 128 * (32 * 32 / 4.4e6 + 128 * 8 / 7.9e6)
    assert one.estimate(Size("bf16", 8, 32_000, 8192), None) == pytest.approx(2.5 + us)


def test_few_programs_of_decode_wait_for_each_step() -> None:
    # 128 blocks, 2 a warp and step: 16 steps, of which 2 are on their way. Or two parts, whose sums are added.
    one = Choice("decode", {**DECODE.options, "splits": 1})
    assert one.estimate(Size("bf16", 8, 64, 8192), None) == pytest.approx(2.5 + 16 * 1.2)
    assert DECODE.estimate(Size("bf16", 8, 64, 8192), None) == pytest.approx(2.5 + 8 * 1.2 + 0.5)


def test_the_least_estimate_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size("bf16", 256, 128 * 144, 8192)
    slow = Entry(Size("bf16", 256, 64, 64), BATCH, 50.0)
    monkeypatch.setattr(hopper_choice, "table", lambda: (slow, Entry(Size("bf16", 512, 64, 64), PREFILL, 0.6)))
    found = hopper_choice._choose.__wrapped__(size)
    assert found.kernel == "prefill"
    assert found.splits > 1  # 12 tiles more than a round
    assert found.estimate(size, 0.6) == min(one.estimate(size, 0.6) for one in PREFILL.with_splits())
