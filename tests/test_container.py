import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from formats.container import Container, Writer, build_header, file_order
from formats.errors import CheckpointError, OutputError
from formats.files import NewFile, publish
from formats.layout import DTYPE_BYTES, TensorSpec
from formats.strict_json import parse_object
from formats.tensors import TORCH_DTYPES, bytes_of, read_tensor, spec_of

F32X2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(header: bytes, data: bytes = b"\0" * 8) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def with_fields(data: bytes = b"\0" * 8, **fields: Any) -> bytes:
    return raw_file(json.dumps(fields).encode(), data)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "shorter than its length field": (b"\1\0\0", "3 bytes"),
    "header longer than the file": ((1 << 40).to_bytes(8, "little") + b"{}", "announced"),
    "header over the limit": ((1 << 63).to_bytes(8, "little") + b"{}", "announced"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "pickle in a zip": (b"PK\x03\x04" + b"\0" * 60, "pickle"),
    "not json": (raw_file(b"{not json"), "not valid JSON"),
    "not utf-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "an array": (raw_file(b"[1]"), "does not begin with"),
    "leading space": (raw_file(b" {}", b""), "does not begin with"),
    "deep nesting": (raw_file(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "duplicate tensor": (raw_file(b'{"a": 1, "a": 2}'), "duplicate key 'a'"),
    "NaN": (raw_file(b'{"a": NaN}'), "NaN is not JSON"),
    "entry is no object": (with_fields(a=3), "needs exactly"),
    "unknown field": (with_fields(a={**F32X2, "strides": [1]}), "needs exactly"),
    "missing field": (with_fields(a={"dtype": "F32", "shape": [2]}), "needs exactly"),
    "unknown type": (with_fields(a={**F32X2, "dtype": "F4"}), "type 'F4' is not supported"),
    "type is no string": (with_fields(a={**F32X2, "dtype": 7}), "type 7 is not supported"),
    "negative size": (with_fields(a={**F32X2, "shape": [-2]}), "shape is"),
    "true as a size": (with_fields(a={**F32X2, "shape": [True, 2]}), "shape is"),
    "float as a size": (with_fields(a={**F32X2, "shape": [2.0]}), "shape is"),
    "begin after end": (with_fields(a={**F32X2, "data_offsets": [8, 0]}), "takes 8 bytes"),
    "three offsets": (with_fields(a={**F32X2, "data_offsets": [0, 8, 8]}), "takes 8 bytes"),
    "size that overflows": (with_fields(a={**F32X2, "shape": [1 << 62, 1 << 62]}), "no file can hold"),
    "number too long to print": (with_fields(a={**F32X2, "shape": [10**4000] * 2}), "shape is"),
    "more dimensions than can be": (with_fields(a={**F32X2, "shape": [2] + [1] * 64}), "no file can hold"),
    "offset too long to add to": (with_fields(a={**F32X2, "data_offsets": [0, 10**4299]}), "data_offsets is"),
    "shape larger than its bytes": (with_fields(a={**F32X2, "shape": [3]}), "takes 12 bytes"),
    "hole at the start": (with_fields(b"\0" * 16, a={**F32X2, "data_offsets": [8, 16]}), "hole or an overlap"),
    "overlap": (with_fields(b"\0" * 12, a=F32X2, b={**F32X2, "data_offsets": [4, 12]}), "hole or an overlap"),
    "two names for one range": (with_fields(a=F32X2, b=F32X2), "hole or an overlap"),
    "cut by a byte": (with_fields(b"\0" * 7, a=F32X2), "header describes"),
    "a byte too many": (with_fields(b"\0" * 9, a=F32X2), "header describes"),
    "name with a control character": (with_fields(**{"a\n": F32X2}), "printable name"),
    "empty name": (with_fields(**{"": F32X2}), "printable name"),
    "long name": (with_fields(**{"a" * 600: F32X2}), "printable name"),
    "metadata is no map of strings": (with_fields(__metadata__={"a": 1}, a=F32X2), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    raw, message = BAD_FILES[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        Container(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", [{"dtype": "F" * 10**6}, {"shape": [-1] * 10**5}, {"data_offsets": [1] * 10**5}])
def test_an_error_says_what_was_found_in_few_words(entry: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(with_fields(a={**F32X2, **entry}))
    with pytest.raises(CheckpointError) as caught:
        Container(tmp_path / "a")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_header_that_was_known_counts_only_as_long_as_the_file_has_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": random(3, 5)}, path)
    with Container(path) as container:
        known = container.header
    with Container(path, known=known) as container:
        assert container.header is known
    for other in ({"b": random(3, 5)}, {"a": random(3, 5), "b": random(2)}):
        save_file(other, path)
        with Container(path, known=known) as container:
            assert container.tensors.keys() == other.keys()


def test_a_key_that_comes_twice_among_many_is_found_at_once() -> None:
    keys = ", ".join(f'"{i}": 0' for i in [*range(100_000), 99_999])
    with pytest.raises(CheckpointError, match="duplicate key '99999'"):
        parse_object(f"{{{keys}}}".encode(), "header")


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": random(3, 5), "b": random(2)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            Container(path)


def test_a_flipped_bit_of_the_header_never_raises_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": random(3, 5), "b": random(2)}, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(header * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with suppress(CheckpointError):
            Container(path).close()


def write(
    path: Path, tensors: dict[str, torch.Tensor], order: Callable[[list[str]], list[str]] = list
) -> tuple[int, str]:
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    with publish(path) as file, Writer(file, specs, {"format": "pt"}) as writer:
        for name in order(list(tensors)):
            data = bytes_of(tensors[name])
            writer.put(name, data[:5])
            writer.put(name, data[5:])
        return writer.finish()


def sample() -> dict[str, torch.Tensor]:
    return {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": random(3, 3),
        "words": torch.arange(7, dtype=torch.int32).view(7, 1),
        "nothing": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "big": random(8, 8, dtype=torch.float32),
    }


def test_the_safetensors_library_reads_what_the_writer_writes(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", sample())
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == sample().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in sample().items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_reader_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    save_file(sample(), tmp_path / "a.safetensors")
    with Container(tmp_path / "a.safetensors") as container:
        for name, tensor in sample().items():
            assert torch.equal(read_tensor(container, name), tensor)


def test_the_writer_knows_size_and_hash_of_its_file_in_any_order(tmp_path: Path) -> None:
    written = write(tmp_path / "a", sample(), order=lambda names: names[::-1])
    data = (tmp_path / "a").read_bytes()
    assert written == (len(data), hashlib.sha256(data).hexdigest())
    assert written == write(tmp_path / "b", sample())


@pytest.mark.parametrize("count", [3, 4, 9])
def test_chunks_are_the_bytes_of_the_file_in_turn(tmp_path: Path, count: int) -> None:
    path, digest = tmp_path / "a.safetensors", hashlib.sha256()
    save_file({"a": random(40, 8), "b": random(3)}, path)
    with Container(path) as container:
        spans = [(i, min(i + 50, container.size)) for i in range(container.tensors["a"].start, container.size, 50)]
        buffers = [memoryview(bytearray(50)) for _ in range(count)]
        found = b"".join(map(bytes, container.chunks(spans, buffers, digest)))  # copies: buffers are used again
    assert len(spans) > 9
    assert path.read_bytes().endswith(found)
    assert len(found) == 640 + 6
    assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()


def test_a_file_that_changes_while_its_chunks_are_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": random(8)}, path)
    with Container(path) as container, pytest.raises(CheckpointError, match="changed while"):
        entry = container.tensors["a"]
        for _ in container.chunks([(entry.start, entry.end)], [memoryview(bytearray(16))] * 3, hashlib.sha256()):
            os.utime(path, (1, 1))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=8
    )
)
def test_every_tensor_starts_at_a_multiple_of_its_element(kinds: list[tuple[str, list[int]]]) -> None:
    specs = {f"t{i}": TensorSpec(dtype, tuple(shape)) for i, (dtype, shape) in enumerate(kinds)}
    header = build_header(specs, {})
    assert len(header) % 64 == 0
    for name, raw in parse_object(header[8:], "header").items():
        if name != "__metadata__":
            assert raw["data_offsets"][0] % DTYPE_BYTES[specs[name].dtype] == 0


def test_tensors_of_whole_words_keep_the_order_given() -> None:
    specs = {name: TensorSpec("BF16", (4,)) for name in ("z", "a", "m")}
    assert file_order(specs) == ["z", "a", "m"]


def test_a_missing_tensor_is_noticed(tmp_path: Path) -> None:
    with publish(tmp_path / "a") as file, Writer(file, {"a": TensorSpec("F32", (2,))}, {}) as writer:
        writer.put("a", b"\0" * 3)
        with pytest.raises(ValueError, match="a: 5 bytes were never written"):
            writer.finish()


def test_a_tensor_of_the_wrong_size_is_noticed(tmp_path: Path) -> None:
    with publish(tmp_path / "a") as file, Writer(file, {"a": TensorSpec("F32", (2,))}, {}) as writer:
        writer.put("a", b"\0" * 7)
        with pytest.raises(ValueError, match="got 1 bytes too many"):
            writer.put("a", b"\0" * 2)


def test_no_thread_outlives_a_writer_that_fails(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)  # which cannot be written
    before = threading.enumerate()
    writer = Writer(NewFile(tmp_path, folder), {"a": TensorSpec("F32", (2,))}, {})
    assert threading.enumerate() == before  # nothing begins that the context does not end
    with pytest.raises(OutputError), writer:
        pass
    os.close(folder)
    assert threading.enumerate() == before


def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": random(64, 64)}, path)
    with Container(path) as container:
        os.truncate(path, 4000)
        with pytest.raises(CheckpointError, match="cut short"):
            read_tensor(container, "a")


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": random(8)}, path)
    with Container(path) as container:
        container.refuse_changed()
        os.utime(path, (1, 1))
        with pytest.raises(CheckpointError, match="changed while"):
            container.refuse_changed()


def test_every_type_of_the_format_has_a_torch_type_of_its_size() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES


def test_no_header_is_written_that_is_over_the_limit_of_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {f"t{i}": TensorSpec("F32", (2,)) for i in range(9)}
    monkeypatch.setattr("formats.container.MAX_HEADER_BYTES", len(build_header(specs, {})) - 8)
    build_header(specs, {})
    with pytest.raises(CheckpointError, match=r"10 tensors need a header of \d+ bytes, .* more and smaller files"):
        build_header({**specs, "t9": TensorSpec("F32", (2,))}, {})
