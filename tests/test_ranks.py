"""Several processes at one conversion, started by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import contents, random, write_checkpoint

from converter.ranks import Ranks
from formats.errors import OutputError

ROOT = Path(__file__).parents[1]


def torchrun(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "converter",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments), "--device", "cpu"], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.proj.weight": random(16, 24, seed=i) for i in range(5)}
    source = write_checkpoint(tmp_path / "source", tensors, shards=5)
    done = torchrun(source, tmp_path / "two", "--group-size", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 tensors quantised") == 1
    alone = [sys.executable, "-m", "converter", source, tmp_path / "one", "--group-size", "8", "--device", "cpu"]
    subprocess.run([*map(str, alone), "--quiet"], cwd=ROOT, check=True, timeout=120)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_folder_that_the_leader_may_not_use_ends_all(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = torchrun(source, tmp_path / "out", "--group-size", 8)
    assert done.returncode
    assert "thesis.tex" in done.stderr
    assert contents(tmp_path / "out") == {"thesis.tex": b"mine"}


def test_every_item_is_for_one_of_the_processes() -> None:
    shares = [Ranks(rank, 3).share(range(7)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def fail() -> None:
    raise OutputError("full")


def test_one_process_leads_itself() -> None:
    assert Ranks().led(lambda: 5) == 5
    with pytest.raises(OutputError, match="full"):
        Ranks().led(fail)
