"""Checkpoints from the Hub: the real huggingface_hub client against a Hub on this machine."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from checkpoints import EXAMPLE, add_to_config, convert_folder, random, write_checkpoint
from huggingface_hub import constants
from local_hub import DROP, REPO, TOKEN, LocalHub, Request
from safetensors.torch import save_file

import runtime
from converter import shards
from converter.cli import command
from converter.conversion import Conversion
from converter.source import open_source
from converter.weights import HubWeights
from formats.errors import CheckpointError, HubError, Int4Error, Int4Warning, OutputError, TemporaryError, UsageError
from formats.hub import download, hub_errors, list_files
from formats.layout import Scheme
from formats.manifest import MANIFEST_NAME, read_manifest
from runtime.load import resolve

NO_COMMIT = "0" * 40
RESOLVE = "*/resolve/*"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ROOT = Path(__file__).parents[1]


def make_checkpoint(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """Write a checkpoint of two shards and return its files by name."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(16, 64, generator=generator).bfloat16() for name in ("a.weight", "b.weight")}
    for shard, (name, tensor) in zip(SHARDS, tensors.items(), strict=True):
        save_file({name: tensor}, folder / shard)
    index = {"metadata": {"total_size": 4096}, "weight_map": dict(zip(tensors, SHARDS, strict=True))}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def convert(*args: str) -> None:
    command.main([*args, "--device", "cpu", "--quiet"], standalone_mode=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(model: str = REPO, revision: str | None = None) -> Int4Error:
    with pytest.raises(Int4Error) as caught:
        open_source(model, revision)
    return caught.value


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that nobody listens at, nor can meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


def test_a_hub_id_converts_to_the_same_bytes_as_its_folder(hub: LocalHub, tmp_path: Path) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    convert(REPO, str(tmp_path / "from_hub"))
    convert(str(tmp_path / "source"), str(tmp_path / "from_folder"))
    from_hub, from_folder = contents(tmp_path / "from_hub"), contents(tmp_path / "from_folder")
    del from_hub[MANIFEST_NAME], from_folder[MANIFEST_NAME]
    assert from_hub == from_folder


def test_manifests_of_a_hub_id_and_its_folder_differ_only_in_the_name_of_the_source(
    hub: LocalHub, tmp_path: Path
) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    convert(REPO, str(tmp_path / "from_hub"))
    convert(str(tmp_path / "source"), str(tmp_path / "from_folder"))
    from_hub, from_folder = read_manifest(tmp_path / "from_hub"), read_manifest(tmp_path / "from_folder")
    renamed = replace(from_hub, source=replace(from_hub.source, id="source", revision=None))
    assert renamed.sealed() == from_folder


def test_the_manifest_records_the_commit_and_not_the_branch(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.push(make_checkpoint(tmp_path / "source"), branch="trial")
    convert(REPO, str(tmp_path / "out"), "--revision", "trial")
    source = read_manifest(tmp_path / "out").source
    assert (source.id, source.revision) == (REPO, commit)


def test_without_a_revision_the_main_branch_is_taken(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.push(make_checkpoint(tmp_path / "source"))
    hub.push(make_checkpoint(tmp_path / "other", seed=1), branch="trial")
    assert open_source(REPO).revision == commit


def test_a_commit_is_a_revision(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.push(make_checkpoint(tmp_path / "older"))
    hub.push(make_checkpoint(tmp_path / "newer", seed=1))
    assert open_source(REPO, commit).revision == commit


def test_a_branch_that_moves_meanwhile_gives_files_of_one_commit(hub: LocalHub, tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path / "older"), make_checkpoint(tmp_path / "newer", seed=1)
    commit = hub.push(older, branch="trial")

    def move_the_branch(request: Request) -> None:
        if request.path.endswith(INDEX):
            hub.push(newer, branch="trial")

    hub.on_request = move_the_branch
    open_source(REPO, "trial")
    assert hub.files_asked_for() == {(commit, name) for name in older}


def test_other_forms_of_the_weights_are_never_asked_for(hub: LocalHub, tmp_path: Path) -> None:
    files = make_checkpoint(tmp_path / "source")
    others = ("pytorch_model.bin", "original/consolidated.00.pth", "training_args.bin", "spare.safetensors", "m.gguf")
    hub.push({**files, **dict.fromkeys(others, b"\x80")})
    open_source(REPO)
    assert {name for _, name in hub.files_asked_for()} == set(files)


def test_safetensors_of_a_subfolder_come_with_the_model(hub: LocalHub, tmp_path: Path) -> None:
    hub.push({**make_checkpoint(tmp_path / "source"), "2_Dense/model.safetensors": b"x"})
    assert "2_Dense/model.safetensors" in open_source(REPO).side_files


def test_a_stale_shard_of_a_repository_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    hub.push({**make_checkpoint(tmp_path / "source"), "model-00003-of-00003.safetensors": b"x"})
    assert "holds model-00003-of-00003.safetensors beside" in str(error_of())


def test_an_index_that_names_a_pickle_is_refused_before_it_is_asked_for(hub: LocalHub) -> None:
    index = json.dumps({"weight_map": {"a.weight": "pytorch_model.bin"}}).encode()
    hub.push({INDEX: index, "pytorch_model.bin": b"\x80"})
    with pytest.raises(CheckpointError, match=r"names 'pytorch_model\.bin'"):
        open_source(REPO)
    assert {name for _, name in hub.files_asked_for()} == {INDEX}


def test_a_repository_that_is_cached_whole_converts_without_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.push(make_checkpoint(tmp_path / "source"))
    convert(REPO, str(tmp_path / "online"))
    hub.fail(500)
    with pytest.warns(Int4Warning, match=f"{REPO}: the Hub cannot be reached; .* taken for all of {commit}"):
        convert(REPO, str(tmp_path / "offline"))
    with pytest.warns(Int4Warning):
        assert open_source(REPO).revision == commit
    assert contents(tmp_path / "offline") == contents(tmp_path / "online")


def test_a_repository_that_is_cached_in_part_is_a_temporary_error(hub: LocalHub, tmp_path: Path) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    open_source(REPO).weights.fetch(SHARDS[0])
    hub.fail(500)
    assert type(error_of()) is TemporaryError


@pytest.mark.filterwarnings("ignore::formats.errors.Int4Warning")
@pytest.mark.parametrize("name", ["tokenizer.json", "2_Dense/model.safetensors"])
def test_a_side_file_that_the_cache_lacks_is_a_temporary_error(hub: LocalHub, tmp_path: Path, name: str) -> None:
    hub.push({**make_checkpoint(tmp_path / "source"), "2_Dense/model.safetensors": b"x"})
    convert(REPO, str(tmp_path / "online"))
    (open_source(REPO).folder / name).unlink()
    hub.fail(500)
    assert type(error_of()) is TemporaryError


def test_files_in_the_blob_store_that_repositories_share_are_read(hub: LocalHub, tmp_path: Path) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    convert(REPO, str(tmp_path / "out"))
    blob = (open_source(REPO).folder / SHARDS[0]).resolve()
    store = tmp_path / "cache" / "blobs" / "ab"
    store.mkdir(parents=True)
    blob.rename(store / blob.name)
    blob.symlink_to(os.path.relpath(store / blob.name, blob.parent))
    assert list(open_source(REPO).shards) == list(SHARDS)


def weight_requests(hub: LocalHub) -> list[Request]:
    return [request for request in hub.requests if request.path.endswith(".safetensors") and request.method == "GET"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dry_run_reads_headers_by_range_and_fetches_no_weights(
    hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranges: bool
) -> None:
    hub.ranges = ranges
    files = make_checkpoint(tmp_path / "source")
    hub.push(files)
    command.main([REPO, str(tmp_path / "out"), "--dry-run", "--device", "cpu"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "int4  a.weight  BF16 [16, 64]  (linear layer)" in printed
    assert "would need: 0.0 MB to download, 0.0 MB of disk for its tensors, about 0.4 GB of memory" in printed
    assert [request.range for request in weight_requests(hub)] == [
        f"bytes=0-{len(files[shard]) - 1}" for shard in SHARDS
    ]
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert {name for _, name in hub.files_asked_for()} == {"config.json", INDEX, *SHARDS}


def test_a_long_header_is_read_with_a_second_request(hub: LocalHub, tmp_path: Path) -> None:
    tensors = {f"{'long' * 100}.{i}.weight": torch.zeros(2, 8).bfloat16() for i in range(200)}
    save_file(tensors, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    hub.push({"model.safetensors": data, "config.json": b"{}"})
    assert open_source(REPO).shards["model.safetensors"].keys() == tensors.keys()
    ends = [int(str(request.range).rpartition("-")[2]) for request in weight_requests(hub)]
    assert ends[0] == (1 << 16) - 1
    assert len(ends) == 2
    assert ends[1] < len(data) - 1


def test_a_damaged_header_on_the_hub_is_refused_before_any_download(hub: LocalHub, tmp_path: Path) -> None:
    files = make_checkpoint(tmp_path / "source")
    hub.push({**files, SHARDS[1]: files[SHARDS[1]] + b"x"})
    assert f"{REPO}: {SHARDS[1]}: is" in str(error_of())


def test_right_size_and_wrong_bytes_are_found(hub: LocalHub, tmp_path: Path) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    hub.damaged.add(SHARDS[1])
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00002.safetensors has the SHA-256 .* remove .*blobs.* and"
    ):
        convert(REPO, str(tmp_path / "out"))
    assert MANIFEST_NAME not in contents(tmp_path / "out")


def test_the_next_shard_is_fetched_while_one_is_converted(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    second, converted = Event(), Conversion.convert

    def note(request: Request) -> None:
        if request.path.endswith(SHARDS[1]) and request.range is None and request.method == "GET":
            second.set()

    def waiting(self: Conversion, chunk: memoryview) -> object:
        assert second.wait(10)
        return converted(self, chunk)

    hub.on_request = note
    monkeypatch.setattr(Conversion, "convert", waiting)
    convert(REPO, str(tmp_path / "out"))


def test_low_disk_never_holds_more_than_two_shards(hub: LocalHub, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.randn(16, 64).bfloat16() for i in range(6)}
    source = write_checkpoint(tmp_path / "source", tensors, shards=6)
    hub.push({path.name: path.read_bytes() for path in source.iterdir()})
    check_low_disk(hub, source, tmp_path, "*-of-00006.safetensors")


def check_low_disk(hub: LocalHub, source: Path, tmp_path: Path, shards: str) -> None:
    """At most two of `shards` are held at a time, none in the cache, and the bytes are those from the folder."""
    held: list[int] = []
    out = tmp_path / "out"
    hub.on_request = lambda request: held.append(len([*out.rglob(shards)]))
    convert(REPO, str(out), "--low-disk")
    convert(str(source), str(tmp_path / "from_folder"))
    assert max(held) in (1, 2)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    found, expected = contents(out), contents(tmp_path / "from_folder")
    del found[MANIFEST_NAME], expected[MANIFEST_NAME]
    assert found == expected  # and nothing staged is left


@pytest.mark.parametrize("ranges", [True, False])
def test_scales_in_another_file_than_their_matrix_are_no_third_file(
    hub: LocalHub, tmp_path: Path, ranges: bool
) -> None:
    names = [f"layers.{i}.weight" for i in range(4)]
    matrices = {name: random(16, 64, seed=i).to(torch.float8_e4m3fn) for i, name in enumerate(names)}
    scales = {f"{name}_scale_inv": torch.full((2, 4), 0.5 + i) for i, name in enumerate(names)}
    source = write_checkpoint(tmp_path / "source", matrices | dict(reversed(scales.items())), shards=8)
    add_to_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 16]})
    hub.push({path.name: path.read_bytes() for path in source.iterdir()})
    hub.ranges = ranges
    check_low_disk(hub, source, tmp_path, "*-of-00008.safetensors")


def test_low_disk_goes_on_behind_the_finished_shards(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    first, convert_shard, fetch = Event(), shards.convert_shard, HubWeights.fetch

    def noting(*args: Any) -> None:
        convert_shard(*args)
        first.set()

    def failing(self: HubWeights, name: str) -> None:
        if name == SHARDS[1]:
            assert first.wait(30)
            raise TemporaryError("busy")
        fetch(self, name)

    with monkeypatch.context() as patched, pytest.raises(TemporaryError, match="busy"):
        patched.setattr(shards, "convert_shard", noting)
        patched.setattr(HubWeights, "fetch", failing)
        convert(REPO, str(tmp_path / "out"), "--low-disk")
    hub.requests.clear()
    convert(REPO, str(tmp_path / "out"), "--low-disk")
    assert not [request for request in weight_requests(hub) if SHARDS[0] in request.path and request.range is None]


@pytest.mark.parametrize(("status", "retry_after"), [(429, "1"), (503, None), (DROP, None)])
def test_a_hub_that_recovers_is_asked_again(
    hub: LocalHub, tmp_path: Path, status: int, retry_after: str | None
) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    hub.fail(status, path=f"{RESOLVE}{SHARDS[1]}", retry_after=retry_after, times=1)
    convert(REPO, str(tmp_path / "out"))
    assert MANIFEST_NAME in contents(tmp_path / "out")


def test_a_download_that_is_cut_off_goes_on(hub: LocalHub, tmp_path: Path) -> None:
    files = make_checkpoint(tmp_path / "source")
    hub.push(files)
    source = open_source(REPO)
    hub.cut.add(SHARDS[1])
    source.weights.fetch(SHARDS[1])
    assert not hub.cut
    assert (source.folder / SHARDS[1]).read_bytes() == files[SHARDS[1]]


def test_the_runtime_resolves_a_hub_id_to_the_files_of_its_commit(hub: LocalHub, tmp_path: Path) -> None:
    files = make_checkpoint(tmp_path / "source")
    commit = hub.push(files, branch="trial")
    folder = resolve(REPO, "trial")
    assert (folder.name, contents(folder)) == (commit, files)


def test_a_model_in_a_subfolder_of_its_repository_is_loaded(hub: LocalHub, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert_folder(EXAMPLE, tmp_path / "out", Scheme(256))
    hub.push({f"sub/{name}": data for name, data in contents(tmp_path / "out").items()})
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(REPO, subfolder="sub", variant="i4", cache_dir=constants.HF_HUB_CACHE)
    assert sum(isinstance(layer, runtime.Int4Linear) for layer in model.modules()) == 21


def test_an_unknown_repository_is_a_hub_error(hub: LocalHub) -> None:
    error = error_of("owner/missing")
    assert (type(error), error.exit_code) == (HubError, 4)
    assert "owner/missing: no such repository" in str(error)


@pytest.mark.parametrize("revision", ["trial", NO_COMMIT])
def test_an_unknown_revision_is_a_hub_error(hub: LocalHub, tmp_path: Path, revision: str) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    error = error_of(revision=revision)
    assert type(error) is HubError
    assert f"at {revision!r}: no such revision" in str(error)


@pytest.mark.parametrize("path", ["*", RESOLVE])
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_is_a_hub_error_that_says_where_its_terms_are(
    hub: LocalHub, tmp_path: Path, status: int, path: str
) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    hub.fail(status, "GatedRepo", path=path)
    error = error_of()
    assert type(error) is HubError
    assert f"https://huggingface.co/{REPO} " in str(error)


@pytest.mark.parametrize("path", ["*", RESOLVE])
@pytest.mark.parametrize(
    ("code", "message"),
    [(None, None), ("RepoNotFound", None), (None, "Invalid credentials in Authorization header")],
    ids=["bare", "unknown or private", "bad token"],
)
def test_a_401_is_a_hub_error(hub: LocalHub, tmp_path: Path, code: str | None, message: str | None, path: str) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    hub.fail(401, code, path=path, message=message)
    assert type(error_of()) is HubError


@pytest.mark.parametrize("path", ["*", RESOLVE])
def test_a_403_is_a_hub_error(hub: LocalHub, tmp_path: Path, path: str) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    hub.fail(403, path=path)
    assert type(error_of()) is HubError


@pytest.mark.parametrize("path", ["*", RESOLVE])
@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_or_broken_hub_is_a_temporary_error(hub: LocalHub, tmp_path: Path, status: int, path: str) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    hub.fail(status, path=path)
    error = error_of()
    assert (type(error), error.exit_code) == (TemporaryError, 75)


@pytest.mark.parametrize("status", [429, 500])
def test_the_error_of_a_busy_or_broken_hub_names_its_status(hub: LocalHub, tmp_path: Path, status: int) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    hub.fail(status)
    assert f"status {status}" in str(error_of())


@pytest.mark.parametrize("path", ["*", RESOLVE])
def test_a_dropped_connection_is_a_temporary_error(hub: LocalHub, tmp_path: Path, path: str) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    hub.fail(DROP, path=path)
    assert type(error_of()) is TemporaryError


def test_an_answer_that_is_no_hubs_is_a_hub_error(hub: LocalHub) -> None:
    hub.fail(200)
    assert type(error_of()) is HubError


def test_a_refused_connection_is_a_temporary_error(local_client: Callable[[str], None], deaf_port: int) -> None:
    local_client(f"http://127.0.0.1:{deaf_port}")
    assert type(error_of()) is TemporaryError
    with pytest.raises(TemporaryError, match=r"failed \(ConnectError\); is the Hub within reach\? check the network"):
        list_files(REPO, "main")


def test_a_repository_that_is_not_cached_is_a_temporary_error_offline(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert type(error_of()) is TemporaryError
    assert not hub.requests


def test_a_mistyped_folder_is_said_not_to_be_there(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TemporaryError, match=r"moedl: no such folder here, and as a Hub repository it is not .* path"):
        resolve("moedl")
    with pytest.raises(TemporaryError, match=r"owner/text: is not in the local cache, and the Hub cannot"):
        download("owner/text", repo_type="dataset")


def raise_in_client(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


@pytest.mark.parametrize("error", [TypeError("x"), AttributeError("x"), NameError("x"), KeyError("x")])
def test_a_mistake_in_a_program_is_no_network_trouble(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raise_in_client(monkeypatch, error)
    with pytest.raises(type(error)):
        download(REPO)


def test_a_mistake_of_ours_around_the_client_is_not_the_hubs() -> None:
    with pytest.raises(ValueError, match="ours"), hub_errors(REPO):
        raise ValueError("ours")


class ReadError(Exception):
    __module__ = "httpx2._exceptions"


@pytest.mark.parametrize("error", [ReadError("x"), RuntimeError("Data processing error: CAS"), TimeoutError()])
def test_trouble_below_the_client_is_a_temporary_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raise_in_client(monkeypatch, error)
    assert type(error_of()) is TemporaryError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_an_output_error(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    raise_in_client(monkeypatch, OSError(number, os.strerror(number)))
    assert type(error_of()) is OutputError


@pytest.mark.parametrize("model", ["a/b/c", "./name", "owner/na me", "hf://owner/name", "owner/name.git"])
def test_a_malformed_id_is_a_usage_error(hub: LocalHub, model: str) -> None:
    assert type(error_of(model)) is UsageError
    assert not hub.requests


@pytest.mark.parametrize("code", [None, "GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound"])
@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_the_token_is_sent_but_appears_in_no_error(
    hub: LocalHub, caplog: pytest.LogCaptureFixture, status: int, code: str | None
) -> None:
    hub.fail(status, code, message=f"Bearer {TOKEN}")
    error = error_of()
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
    assert TOKEN not in str(error) + caplog.text


def test_a_quiet_conversion_from_the_hub_prints_nothing(
    hub: LocalHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    convert(REPO, str(tmp_path / "out"))
    assert capfd.readouterr() == ("", "")


def test_only_allowed_files_of_a_repository_are_downloaded(hub: LocalHub, tmp_path: Path) -> None:
    hub.push(make_checkpoint(tmp_path / "source"))
    assert contents(download(REPO, allow=["*.json"], ignore=["config.json"])).keys() == {INDEX, "tokenizer.json"}


def test_the_command_ends_with_one_line_and_exit_code_4_for_an_unknown_repository(tmp_path: Path) -> None:
    with LocalHub(REPO) as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        done = subprocess.run(
            [sys.executable, "-m", "converter", "owner/missing", str(tmp_path / "out"), "--device", "cpu"],
            env=inherited | settings, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == HubError.exit_code == 4
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: owner/missing: ")
