import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not on this platform")

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, TESTS / "compile_kernels.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_kind_of_gpu(rows: list[list[str]]) -> None:
    binaries = {"sm_80": "cubin", "sm_90": "cubin", "gfx942": "hsaco"}
    assert {chip for chip, *_ in rows} == binaries.keys()
    assert all(binaries[chip] in stages.split(",") for chip, _, stages, *_ in rows)


def test_no_kernel_of_the_table_spills_registers(rows: list[list[str]]) -> None:
    shipped = {name: spilled for chip, name, _, spilled, _ in rows if "{" in name}
    assert {name.split()[0] for name in shipped} == {"decode", "batch", "prefill", "reduce", "fp8", "quantize_tokens"}
    assert {name: spilled for name, spilled in shipped.items() if spilled != "0"} == {}


def test_every_kernel_of_the_table_has_room_for_its_ring(rows: list[list[str]]) -> None:
    shared = {name: int(nbytes) for _, name, _, _, nbytes in rows if "{" in name}
    assert any(name.endswith("narrow") for name in shared)
    assert {name: nbytes for name, nbytes in shared.items() if nbytes > 227 << 10} == {}


def test_no_portable_product_spills_registers(rows: list[list[str]]) -> None:
    products = {(chip, name): spilled for chip, name, _, spilled, _ in rows if name.startswith(("matmul", "splitk"))}
    assert {key: spilled for key, spilled in products.items() if spilled not in ("0", "-")} == {}
