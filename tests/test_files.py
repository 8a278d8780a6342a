import os
import subprocess
import sys
from pathlib import Path

import pytest

from formats.errors import CheckpointError, OutputError, TemporaryError
from formats.files import lock, open_regular, publish, publish_bytes, safe_name, write_all

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
    "a\nb",
    "a\0b",
    "..",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="could leave its folder"):
        safe_name(name, "index")


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json", ".hidden", "a b"])
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
    with pytest.raises(KeyboardInterrupt), publish(path) as fd:
        write_all(fd, b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_file_system_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        publish_bytes(tmp_path / "missing" / "file", b"x")


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
