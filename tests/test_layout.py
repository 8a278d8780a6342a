import pytest

from formats.errors import UsageError
from formats.layout import Scheme, TensorSpec, stored_tensors


@pytest.mark.parametrize("size", [0, -2, 7, 12, -8, 1 << 63])
def test_a_group_size_that_is_no_multiple_of_8_or_over_64_bits_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"group size {size}"):
        Scheme(size)


@pytest.mark.parametrize(
    ("size", "columns", "groups"),
    [(256, 2048, 8), (256, 300, 2), (256, 172, 1), (8, 20, 3), (-1, 9999, 1), (1 << 30, 172, 1)],
)
def test_groups_count_the_short_last_one(size: int, columns: int, groups: int) -> None:
    assert Scheme(size).groups(columns) == groups


def test_symmetric_matrix_is_words_and_scales() -> None:
    assert Scheme(64).stored("m.weight", (37, 172), "BF16") == {
        "m.weight_packed": TensorSpec("I32", (37, 22)),
        "m.weight_scale": TensorSpec("BF16", (37, 3)),
    }


def test_asymmetric_matrix_packs_zero_points_along_the_rows() -> None:
    assert Scheme(64, symmetric=False).stored("m.weight", (37, 172), "F16")["m.weight_zero_point"] == TensorSpec(
        "I32", (5, 3)
    )


def test_a_stack_is_its_matrices_one_behind_the_other() -> None:
    assert stored_tensors("m.experts.up_proj", TensorSpec("F16", (5, 37, 172)), Scheme(64, symmetric=False)) == {
        "m.experts.up_proj_packed": TensorSpec("I32", (5, 37, 22)),
        "m.experts.up_proj_scale": TensorSpec("F16", (5, 37, 3)),
        "m.experts.up_proj_zero_point": TensorSpec("I32", (5, 5, 3)),
    }


@pytest.mark.parametrize(("source", "scale"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16")])
def test_scales_have_the_16_bit_type_of_the_source(source: str, scale: str) -> None:
    assert stored_tensors("w", TensorSpec(source, (8, 8)), Scheme(8))["w_scale"].dtype == scale


def test_large_matrices_cost_at_most_4_07_bits_a_weight() -> None:
    stored = Scheme(256).stored("w", (8192, 2048), "BF16")
    assert 8 * sum(spec.nbytes for spec in stored.values()) / (8192 * 2048) <= 4.07
