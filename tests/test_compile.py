import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not on this platform")

TESTS = Path(__file__).parent


def test_every_kernel_compiles_for_every_kind_of_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, TESTS / "compile_kernels.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert {chip for chip, _, _ in rows} == {"sm_80", "sm_90", "gfx942"}
    binaries = {"sm_80": "cubin", "sm_90": "cubin", "gfx942": "hsaco"}
    assert all(binaries[chip] in stages.split(",") for chip, _, stages in rows)
