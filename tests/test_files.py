import errno
import fcntl
import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from formats.errors import CheckpointError, OutputError, TemporaryError
from formats.files import link_roots, lock, open_regular, publish, publish_bytes, read_blocks, safe_name

ESCAPES = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "C:x",
    "\\\\host\\x",
    "a\\b",
    "",
    "~/x",
    "a//b",
    "./x",
    "..",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="could leave its folder"):
        safe_name(name, "index")


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "caf\udce9.txt"])
def test_names_that_are_no_printable_text_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not printable UTF-8; rename"):
        safe_name(name, "index")


@pytest.mark.parametrize("name", ["a" * 256, "é" * 128, "a/" * 600 + "a"])
def test_names_that_no_file_system_takes_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="is too long; shorten it") as caught:
        safe_name(name, "index")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name", ["a" * 255, "model.safetensors", "1_Pooling/config.json", ".hidden", "a b", "~$notes.txt"]
)
def test_plain_names_pass(name: str) -> None:
    assert safe_name(name, "index") == name


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_regular(tmp_path / "pipe")


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside"):
        open_regular(root / "link", [root])


@pytest.mark.parametrize("roots", [True, False])
def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path, roots: bool) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: cannot be opened"):
        open_regular(tmp_path / "loop", [tmp_path] if roots else [])


def test_a_disk_that_cannot_be_read_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr("builtins.open", lambda fd, mode: os.close(fd) or Broken())
    with pytest.raises(CheckpointError, match=r"file: cannot be read \(Input/output error\)"):
        list(read_blocks(tmp_path / "file"))


def test_links_in_a_snapshot_may_not_lead_to_a_shared_store_that_is_itself_a_link(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    repository = snapshot.parent.parent
    assert link_roots(snapshot) == (repository, tmp_path / "hub" / "blobs")
    (tmp_path / "hub" / "blobs").symlink_to(tmp_path)
    assert link_roots(snapshot) == (repository,)


def test_file_and_folder_are_on_disk_before_and_after_the_file_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def recorded_replace(old: Path, new: Path) -> None:
        events.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    publish_bytes(tmp_path / "file", b"x")
    assert events == ["file", "replace", "folder"]


def test_a_published_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        publish_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), publish(path) as file:
        file.write(b"ne", 0)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_file_system_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        publish_bytes(tmp_path / "missing" / "file", b"x")


def test_an_error_in_the_body_of_publish_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), publish(tmp_path / "file"):
        (tmp_path / "source").read_bytes()


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    held = tmp_path / "lock"
    program = f"from formats.files import lock; from pathlib import Path\nwith lock(Path({str(held)!r})): pass"
    with lock(held):
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert f"in use by process {os.getpid()}" in other.stderr
    assert not held.exists()


def test_a_lock_that_is_held_raises(tmp_path: Path) -> None:
    with lock(tmp_path / "lock"), pytest.raises(TemporaryError), lock(tmp_path / "lock"):
        pass


def test_a_lock_file_left_by_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("999999\n")
    with lock(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="symbolic links"), lock(tmp_path / "lock"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_file_that_is_no_lock_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("precious")
    with pytest.raises(OutputError, match="is no lock file of ours"), lock(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "precious"


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*args: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [(fcntl, "flock", errno.ENOLCK), (os, "pwrite", errno.ENOSPC), (os, "ftruncate", errno.EIO)],
)
def test_a_lock_that_the_file_system_refuses_is_an_output_error_and_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, number: int
) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    monkeypatch.setattr(module, name, failing(number))
    with pytest.raises(OutputError, match=os.strerror(number)), lock(tmp_path / "lock"):
        pass
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_lock_file_that_its_holder_removed_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, 0

    def removed_first(fd: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / "lock").unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with lock(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()


def test_a_signal_right_after_the_file_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.open

    def make_and_stop(*arguments: Any) -> int:
        os.close(make(*arguments))
        raise SystemExit(143)

    monkeypatch.setattr(os, "open", make_and_stop)
    with pytest.raises(SystemExit), publish(tmp_path / "name"):
        pass
    assert list(tmp_path.iterdir()) == []
