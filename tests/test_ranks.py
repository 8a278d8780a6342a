"""Several processes at one conversion, started by torchrun."""

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from checkpoints import contents, random, write_checkpoint

from converter.ranks import Ranks, joined_ranks
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


WAITING = """
import os, signal, sys, time
from converter.ranks import joined_ranks

with joined_ranks() as ranks:
    ranks.led(lambda: None)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        ranks.led(lambda: None)
    except Exception as error:
        print(type(error).__name__, flush=True)
    os._exit(0)
"""


def test_a_process_that_is_killed_is_noticed_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING], cwd=ROOT, env={**settings, "RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert processes[0].communicate(timeout=60)[0] == "TemporaryError\n"
    assert processes[1].wait(timeout=60) == -signal.SIGKILL


def test_shares_may_differ_by_days(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[timedelta] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, found in {"get_rank": 0, "get_world_size": 2, "destroy_process_group": None}.items():
        monkeypatch.setattr(torch.distributed, name, lambda found=found: found)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: waits.append(timeout))
    with joined_ranks() as ranks:
        assert ranks == Ranks(0, 2)
    assert waits[0] >= timedelta(days=2)
    assert waits[0].total_seconds() * 1000 < 1 << 31  # of the milliseconds that a socket waits
