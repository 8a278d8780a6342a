"""What engines would make of a plan, by facts that their code states."""

import json
from pathlib import Path

import pytest
from checkpoints import EXAMPLE
from click.testing import CliRunner

from converter.cli import command
from converter.convert import make_recipe
from converter.plan import Plan, ShardPlan, TensorPlan
from converter.targets import Verdict, forecast
from formats.errors import UsageError
from formats.layout import ROW_WISE, Scheme, TensorSpec

ATTENTION, MLP, EXPERT = "model.layers.0.self_attn.", "model.layers.0.mlp.", "model.layers.0.mlp.experts.7."
LLAMA = {
    f"{ATTENTION}q_proj": (4096, 4096), f"{ATTENTION}k_proj": (1024, 4096), f"{ATTENTION}v_proj": (1024, 4096),
    f"{ATTENTION}o_proj": (4096, 4096), f"{MLP}gate_proj": (14336, 4096), f"{MLP}up_proj": (14336, 4096),
    f"{MLP}down_proj": (4096, 14336),
}  # fmt: skip
EXPORT = "int4-export OUT_DIR EXPORT --to compressed-tensors"
FAST, SLOW = "Machete on Hopper, else Marlin", "Triton W4A16 (slow)"


def plan_of(
    shapes: dict[str, tuple[int, int]],
    group_size: int = 256,
    *,
    symmetric: bool = True,
    dtype: str = "BF16",
    kept: tuple[str, ...] = (),
) -> Plan:
    tensors = tuple(
        TensorPlan(f"{name}.weight", TensorSpec(dtype, shape), name not in kept, False, "", {})
        for name, shape in shapes.items()
    )
    return Plan(make_recipe(Scheme(group_size, symmetric), "absmax", (), ()), (ShardPlan("a", "b", tensors),))


def kernels(plan: Plan, target: str, gpus: int = 1) -> set[str | None]:
    return {verdict.kernel for verdict in forecast(plan, target, gpus).verdicts.values()}


def the_verdict(name: str, shape: tuple[int, int], target: str, gpus: int, group_size: int = 256) -> Verdict:
    return forecast(plan_of({name: shape}, group_size), target, gpus).verdicts[f"{name}.weight"]


@pytest.mark.parametrize(
    ("target", "group_size", "kernel"),
    [
        ("vllm", 256, SLOW), ("vllm", 128, FAST), ("vllm", 64, FAST), ("vllm", 32, "Marlin"), ("vllm", ROW_WISE, FAST),
        ("vllm", 512, "Humming where Humming is installed"),
        ("sglang", 256, None), ("sglang", 128, "Marlin"), ("sglang", ROW_WISE, "Marlin"),
        ("transformers", 256, "Int4Linear"), ("transformers", 40, "Int4Linear"),
    ],
)  # fmt: skip
def test_the_group_size_chooses_the_kernel(target: str, group_size: int, kernel: str | None) -> None:
    assert kernels(plan_of(LLAMA, group_size), target) == {kernel}


def test_what_a_kernel_takes_beside_groups() -> None:
    assert kernels(plan_of(LLAMA, dtype="F16"), "vllm") == {"Exllama (slow)"}
    assert kernels(plan_of(LLAMA, dtype="F16", symmetric=False), "vllm") == {SLOW}
    assert kernels(plan_of({"a": (4096 + 64, 4096)}, 128), "vllm") == {"Marlin"}  # no multiple of Machete's 128 rows
    assert kernels(plan_of({"a": (8608, 4096)}, 128), "sglang") == {None}  # size_n = 8608: sglang issue 28018
    assert kernels(plan_of({f"{EXPERT}up_proj": (768, 2048)}, 128, symmetric=False), "vllm") == {None}


def test_fused_matrices_meet_the_kernel_together() -> None:
    siblings = {f"{ATTENTION}{name}": (rows, 4096) for name, rows in (("q_proj", 96), ("k_proj", 16), ("v_proj", 16))}
    assert kernels(plan_of(siblings, 128), "sglang") == {"Marlin"}
    assert kernels(plan_of({f"{ATTENTION}q_proj": (96, 4096)}, 128), "sglang") == {None}


@pytest.mark.parametrize("target", ["vllm", "sglang", "transformers"])
def test_each_gpu_needs_whole_groups_of_a_matrix_that_is_split_along_them(target: str) -> None:
    down, up = f"{EXPERT}down_proj", f"{EXPERT}up_proj"
    assert the_verdict(down, (2048, 768), target, 2) == Verdict(
        None, "384 columns on each GPU are no multiple of the group size, 256"
    )
    assert the_verdict(down, (2048, 768), target, 2, group_size=128).kernel is not None
    assert the_verdict(up, (768, 2048), target, 2, group_size=128).kernel is not None
    assert the_verdict(up, (768, 2048), target, 5) == Verdict(None, "768 rows do not divide by 5 GPUs")
    assert the_verdict(f"{MLP}down_proj", (4096, 14336), target, 8, group_size=128).kernel is not None


def test_a_word_of_zero_points_stays_on_one_gpu() -> None:
    plan = plan_of({f"{ATTENTION}q_proj": (72, 4096)}, 128, symmetric=False)
    assert forecast(plan, "transformers", 3).verdicts[f"{ATTENTION}q_proj.weight"].kernel is not None
    found = forecast(plan, "transformers", 2).verdicts[f"{ATTENTION}q_proj.weight"]
    assert found == Verdict(None, "36 rows on each GPU share words of zero points, which 8 have")
    assert kernels(plan_of({f"{ATTENTION}q_proj": (72, 4096)}, 128), "transformers", 2) == {"Int4Linear"}


def test_what_cannot_be_exported_is_not_advised_to_be() -> None:
    """A group that ends with its row is shorter than the others."""
    found = forecast(plan_of(LLAMA | {"a": (4096, 4096 + 192)}, 256), "vllm", 1)
    assert not any("--group-size 128" in line for line in found.advice)
    assert found.advice[0].startswith(f"{EXPORT} --group-size 64")
    assert not any("int4-export" in line for line in forecast(plan_of({"a": (4096, 4096 + 8)}), "vllm").advice)


def test_a_short_last_group_stays_with_us() -> None:
    assert the_verdict("a", (64, 384), "transformers", 1).kernel == "Int4Linear"
    assert the_verdict("a", (64, 384), "vllm", 1) == Verdict(None, "384 columns are no multiple of the group size, 256")


def test_a_scale_for_a_whole_row_is_split_by_vllm_alone() -> None:
    assert the_verdict(f"{ATTENTION}o_proj", (4096, 4096), "vllm", 4, ROW_WISE) == Verdict(FAST)
    assert "whole row cannot be split" in str(
        the_verdict(f"{ATTENTION}o_proj", (4096, 4096), "transformers", 4, ROW_WISE)
    )


def test_what_is_not_split_is_whole_on_every_gpu() -> None:
    assert the_verdict(f"{ATTENTION}kv_a_proj_with_mqa", (576, 7168), "vllm", 128, 128).kernel == "Marlin"


@pytest.mark.parametrize(
    ("target", "group_size", "gpus", "advice"),
    [
        ("vllm", 256, 1, f"{EXPORT} --group-size 128: the same weights for it; then {FAST} (7 tensors)"),
        ("sglang", 256, 8, f"{EXPORT} --group-size 128: the same weights for it; then Marlin (7 tensors)"),
        ("vllm", 128, 1, f"{EXPORT}: the same weights for it"),
        ("sglang", 40, 1, "convert with --group-size 128; then Marlin (7 tensors)"),
        ("transformers", ROW_WISE, 2, "convert with --group-size 256; then Int4Linear (7 tensors)"),
    ],
)  # fmt: skip
def test_the_advice_leads_to_a_kernel(target: str, group_size: int, gpus: int, advice: str) -> None:
    assert forecast(plan_of(LLAMA, group_size), target, gpus).advice == (advice,)


def test_where_all_is_well_there_is_nothing_to_do() -> None:
    assert forecast(plan_of(LLAMA), "transformers", 8).advice == ()


def test_what_no_group_size_helps_is_named() -> None:
    found = forecast(plan_of(LLAMA | {"a": (4097, 4096)}, 128), "vllm", 2)
    assert found.advice[-1] == "keep a.weight by --exclude, or take fewer GPUs: no group size helps"


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_siblings_that_differ_stop_the_engine(target: str) -> None:
    plan = plan_of(LLAMA, 128, kept=(f"{ATTENTION}v_proj", f"{MLP}down_proj"))
    first, *_ = forecast(plan, target).advice
    assert first.startswith(f"quantise k_proj and q_proj and v_proj of {ATTENTION[:-1]} alike")
    assert "k_proj and q_proj would be int4 and v_proj not" in first
    assert "Detected some but not all shards" in first
    alike = plan_of(LLAMA, 128, kept=(f"{MLP}down_proj",))
    assert not any("alike" in line for line in forecast(alike, target).advice)


def test_the_dry_run_says_it_for_each_tensor_and_in_json() -> None:
    arguments = [str(EXAMPLE), "out", "--dry-run", "--target", "vllm", "--tensor-parallel", "2"]
    lines = CliRunner().invoke(command, arguments).output.splitlines()
    reason = "Marlin takes groups of 32, 64, 128 or whole rows"
    row = "int4  model.layers.0.self_attn.q_proj.weight  BF16 [256, 256]  (linear layer)"
    assert f"{row}  -> {SLOW}, because {reason}" in lines
    assert "vLLM 0.33 on 2 GPUs, by what its code says:" in lines
    assert f"  15 tensors: {SLOW}, because {reason}" in lines
    assert lines[-1].startswith(f"to do: {EXPORT} --group-size 64: ")
    found = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).output)["target"]
    assert found.keys() == {"engine", "tensor_parallel", "verdicts", "advice"}
    assert found["verdicts"]["model.layers.0.self_attn.q_proj.weight"] == {"kernel": SLOW, "problem": reason}
    assert (found["engine"], len(found["verdicts"])) == ("vLLM 0.33", 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--target", "vllm"], "give --dry-run too"), (["--dry-run", "--tensor-parallel", "2"], "give --target sglang, ")],
)
def test_an_option_that_would_say_nothing_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(command, [str(EXAMPLE), str(tmp_path / "out"), *options])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
