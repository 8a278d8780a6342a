import pytest

from runtime.kernels import hopper_choice
from runtime.kernels.hopper_choice import Choice, Entry, Size, Table, bucket, choose

KERNELS = {"decode", "batch", "prefill", "fp8"}
DECODE = Choice("decode", {"rows": 32, "tokens": 8, "warps": 4, "splits": 2, "step": 2, "buffers": 2})
BATCH = Choice("batch", {"tokens": 64, "warps": 4, "splits": 1, "raster": 8, "step": 2, "buffers": 3})
PREFILL = Choice(
    "prefill", {"rows": 128, "tokens": 256, "programs": 1, "splits": 1, "raster": 4, "step": 1, "buffers": 4}
)


def test_a_measured_size_has_its_own_choice() -> None:
    for entry in hopper_choice.table().entries:
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


def test_decode_does_not_wait_for_each_of_many_steps() -> None:
    single = Choice("decode", {**DECODE.options, "splits": 1, "buffers": 1})
    assert single.takes(Size("bf16", 8, 64, 2 * 4 * 64))
    assert not single.takes(Size("bf16", 8, 64, 2 * 2 * 4 * 64))


def test_a_processor_runs_the_programs_that_it_has_room_for() -> None:
    slot = 2 * (64 * 128 + 64 * 34)  # bytes of two blocks of tokens, and of words and scales
    assert BATCH.programs == 227 * 1024 // (3 * slot)
    assert PREFILL.programs == 1
    small = Choice("decode", {**DECODE.options, "rows": 16, "tokens": 1})
    assert small.programs == 32 // 4  # by its registers


def test_kinds_differ_in_more_than_parts_of_k_and_the_order_of_tiles() -> None:
    other = Choice("batch", {**BATCH.options, "splits": 4, "raster": 16})
    assert other.kind == BATCH.kind
    assert other.kind != Choice("batch", {**BATCH.options, "warps": 8}).kind


def times_of(choice: Choice, size: Size) -> dict[str, float]:
    """The terms without the name of the kind."""
    return {name.removeprefix(choice.kind).removeprefix(choice.kernel).strip(): count
            for name, count in choice.terms(size).items()}  # fmt: skip


@pytest.mark.parametrize(("rows", "rounds"), [(128, 1), (128 * 132, 1), (128 * 133, 2), (128 * 264, 2)])
def test_every_round_of_programs_takes_all_steps(rows: int, rounds: int) -> None:
    found = times_of(PREFILL, Size("bf16", 256, rows, 6400))
    assert found == {"start": 1, "round": rounds - 1, "wait": rounds * 100, "busy": rounds * 100}


def test_prefill_splits_the_tiles_of_the_last_round_only() -> None:
    halves = Choice("prefill", {**PREFILL.options, "splits": 2})
    found = times_of(halves, Size("bf16", 256, 128 * 133, 6400))
    assert found["wait"] == found["busy"] == 150
    assert found["split"] == 2
    assert found["MiB to add up"] == 2 * 128 * 256 * 4 / 2**20


def test_a_processor_is_busy_for_each_of_its_programs() -> None:
    programs = BATCH.programs
    assert programs > 2
    full = times_of(BATCH, Size("bf16", 64, 64 * 132 * programs, 6400))
    assert (full["wait"], full["busy"]) == (50, 50 * programs)
    more = times_of(BATCH, Size("bf16", 64, 64 * 132 * (programs + 2), 6400))
    assert (more["wait"], more["busy"]) == (100, 50 * (programs + 2))


def test_a_step_is_taken_whole() -> None:
    assert times_of(BATCH, Size("bf16", 64, 64, 9 * 64))["wait"] == 5


def test_the_least_estimate_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size("bf16", 256, 128 * 144, 8192)
    choices = [*BATCH.with_splits(), *PREFILL.with_splits()]
    us = dict.fromkeys((name for choice in choices for name in choice.terms(size)), 0.1)
    us |= {f"{BATCH.kind} wait": 50.0}
    table = Table((Entry(Size("bf16", 256, 64, 64), BATCH), Entry(Size("bf16", 512, 64, 64), PREFILL)), us)
    monkeypatch.setattr(hopper_choice, "table", lambda: table)
    found = hopper_choice._choose.__wrapped__(size)
    assert found.kernel == "prefill"
    assert found.splits > 1  # 12 tiles more than a round
    assert table.estimate(size, found) == min(table.estimate(size, one) for one in choices)


def test_every_choice_can_be_estimated() -> None:
    table, size = hopper_choice.table(), Size("bf16", 64, 6000, 6000)
    for entry in table.entries:
        assert all(table.estimate(size, one) > 0 for one in entry.choice.with_splits())
