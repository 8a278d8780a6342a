"""Any call to the operating system may fail: the error is ours, nothing half-made has a name, the next run finishes."""

import errno
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, convert_folder, random, write_checkpoint
from os_calls import watched

from converter.conversion import Conversion
from converter.convert import convert, make_recipe
from converter.passage import Copied, Passage
from converter.plan import make_plan
from converter.quantize import METHODS
from converter.source import open_source
from formats.checkpoint import Checkpoint
from formats.errors import Int4Error
from formats.layout import Scheme
from formats.manifest import MANIFEST_NAME


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {"a.weight": random(8, 16), "b.weight": random(3, 3), "odd": random(3)}
    return write_checkpoint(tmp_path / "source", tensors, shards=2)


def fail_at(moment: int, error: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the call number `moment` to the operating system fail; a list that then holds its name."""
    failed: list[str] = []

    def fail(number: int, name: str) -> None:
        if number == moment:
            failed.append(name)
            raise OSError(error, os.strerror(error))

    for name, call in watched(fail).items():
        monkeypatch.setattr(os, name, call)
    return failed


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_after_any_failed_call_the_same_command_gives_the_same_bytes(
    source: Path, tmp_path: Path, out: Path, error: int
) -> None:
    convert_folder(source, tmp_path / "whole")
    whole, names = contents(tmp_path / "whole"), set[str]()
    for moment in count(1):
        shutil.rmtree(out, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patched:
            failed = fail_at(moment, error, patched)
            raised: BaseException | None = None
            try:
                convert_folder(source, out)
            except Exception as found:
                raised = found
        if not failed:
            break
        names |= set(failed)
        assert raised is None or isinstance(raised, Int4Error), (moment, failed, raised)
        found_files = contents(out) if out.exists() else {}
        assert all(found_files[name] == whole[name] for name in found_files.keys() & whole.keys())
        if MANIFEST_NAME not in found_files:
            convert_folder(source, out)
        assert contents(out).items() >= whole.items()
        Checkpoint(out).verify()
    assert moment > 60
    assert names >= {"open", "preadv", "pwrite", "fsync", "replace"}


def test_a_gpu_without_memory_gets_smaller_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", {"a.weight": random(64, 32)}, shards=1)
    convert_folder(source, tmp_path / "whole", Scheme(8, symmetric=False))
    absmax, sizes = METHODS["absmax"], list[int]()

    def short_of_memory(weight: torch.Tensor, *rest: Any) -> object:
        sizes.append(len(weight))
        if len(weight) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return absmax(weight, *rest)

    monkeypatch.setitem(METHODS, "absmax", short_of_memory)
    convert_folder(source, tmp_path / "out", Scheme(8, symmetric=False))
    assert sizes == [64, 32, 16, 16, 32, 16, 16]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_memory_for_not_even_eight_rows_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", {"a.weight": random(64, 32)}, shards=1)

    def no_memory(*rest: Any) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(METHODS, "absmax", no_memory)
    with pytest.raises(Int4Error, match=r"'a\.weight': even 8 of its rows do not fit into the memory of cpu"):
        convert_folder(source, tmp_path / "out")


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.chunks.CHUNK_BYTES", 1 << 12)
    source = write_checkpoint(tmp_path / "source", {"a.weight": random(4096, 64), "head": random(4096, 64)}, shards=1)
    sizes: list[int] = []

    def noting(convert: Callable[[Passage, memoryview], object]) -> Callable[[Passage, memoryview], object]:
        def noted(self: Passage, chunk: memoryview) -> object:
            sizes.append(len(chunk))
            return convert(self, chunk)

        return noted

    for kind in (Conversion, Copied):
        monkeypatch.setattr(kind, "convert", noting(kind.convert))
    opened = open_source(str(source))
    plan = make_plan(opened, make_recipe(Scheme(8), "absmax", (), ()))
    convert(opened, plan, tmp_path / "out", [torch.device("cpu")])
    assert max(sizes) == 1 << 12
    assert sum(sizes) == opened.nbytes
