"""Publishing: the real huggingface_hub client against a Hub on this machine."""

import json
import sys
from pathlib import Path
from threading import Event

import pytest
from checkpoints import add_to_config, contents, convert_folder, write_checkpoint
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import are_progress_bars_disabled
from local_hub import DROP, REPO, TOKEN, LocalHub, Request
from local_repository import NEW, Repository

import converter.cli
import converter.push_cli
from converter.conversion import Conversion
from converter.passage import Copied
from converter.push import Upload
from formats.checkpoint import Checkpoint
from formats.errors import CheckpointError, HubError, Int4Error, TemporaryError, UsageError
from formats.files import hash_file
from formats.hub import download
from formats.manifest import CARD_NAME, EVALUATION_NAME, MANIFEST_NAME, read_manifest

TARGET = "owner/model-i4"
COMMIT = f"/api/models/{TARGET}/commit/*"
SHARDS = ("model-00001-of-00002.i4.safetensors", "model-00002-of-00002.i4.safetensors")
SOURCE_CARD = "---\nlicense: mit\n---\n# A model\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "source")
    (folder / CARD_NAME).write_text(SOURCE_CARD)
    return folder


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """A checkpoint of two shards."""
    convert_folder(source, tmp_path / "out")
    return tmp_path / "out"


def push(*args: object) -> None:
    converter.push_cli.command.main([str(arg) for arg in args], standalone_mode=False)


def convert(*args: object) -> None:
    options = ["--device", "cpu", "--group-size", "8", "--method", "absmax"]
    converter.cli.command.main([*map(str, args), *options], standalone_mode=False)


def error_of(*args: object) -> Int4Error:
    with pytest.raises(Int4Error) as caught:
        push(*args)
    return caught.value


def head(hub: LocalHub, repo: str = TARGET) -> dict[str, bytes]:
    return hub.repositories[repo].files()


def sent(hub: LocalHub) -> list[str]:
    """The SHA-256 of every large file whose bytes were sent."""
    return [request.path.rpartition("/")[2] for request in hub.requests if request.method == "PUT"]


def commits(hub: LocalHub) -> list[Request]:
    return [request for request in hub.requests if "/commit/" in request.path and request.method == "POST"]


def digests(folder: Path) -> set[str]:
    return {hash_file(path)[1] for path in folder.glob("*.safetensors")}


def test_a_checkpoint_becomes_one_commit_with_a_card(hub: LocalHub, out: Path) -> None:
    push(out, TARGET)
    card = head(hub)[CARD_NAME].decode()
    assert head(hub) == {**NEW, **contents(out), CARD_NAME: card.encode()}
    assert ModelCard(card).data.to_dict() == {
        "license": "mit", "library_name": "int4-convert", "tags": ["int4", "int4-convert"],
    }  # fmt: skip
    assert len(commits(hub)) == 1
    assert sorted(sent(hub)) == sorted(digests(out))


def test_what_comes_back_from_the_hub_is_verified(hub: LocalHub, out: Path) -> None:
    push(out, TARGET)
    assert Checkpoint(download(TARGET)).verify() == len(contents(out)) - 2  # but manifest and card


def test_a_damaged_side_file_of_what_comes_back_is_found(hub: LocalHub, out: Path) -> None:
    push(out, TARGET)
    hub.damaged.add("tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: SHA-256 is"):
        Checkpoint(download(TARGET)).verify()


def test_a_second_push_has_nothing_to_send(
    hub: LocalHub, out: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    push(out, TARGET)
    printed = capsys.readouterr().out
    assert printed == f"{TARGET}: {hub.url}/{TARGET}/commit/{hub.repositories[TARGET].branches['main']}\n"
    hub.requests.clear()
    push(out, TARGET)
    assert capsys.readouterr() == (f"{TARGET}: holds these files already, nothing to commit\n", "")
    assert not sent(hub) + commits(hub)
    assert not caplog.text


def test_json_says_where_the_commit_is(hub: LocalHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(out, "model-i4", "--json")
    commit = hub.repositories["me/model-i4"].branches["main"]
    assert json.loads(capsys.readouterr().out) == {
        "repo_id": "me/model-i4", "url": f"{hub.url}/me/model-i4/commit/{commit}",
    }  # fmt: skip
    push(out, "model-i4", "--json")
    assert json.loads(capsys.readouterr().out) == {"repo_id": "me/model-i4", "url": None}


def test_a_push_that_was_stopped_goes_on_without_what_was_sent(hub: LocalHub, out: Path) -> None:
    first, _ = (hash_file(out / name)[1] for name in SHARDS)
    hub.fail(500, path=f"/uploads/{first}", times=6)  # as often as the client tries
    assert type(error_of(out, TARGET)) is TemporaryError
    assert head(hub) == NEW
    done = set(hub.repositories[TARGET].stored) & digests(out)
    hub.requests.clear()
    push(out, TARGET)
    assert sorted(sent(hub)) == sorted(digests(out) - done)
    assert MANIFEST_NAME in head(hub)


def test_a_commit_that_failed_is_made_without_sending_again(hub: LocalHub, out: Path) -> None:
    hub.fail(503, path=COMMIT, times=1)
    assert type(error_of(out, TARGET)) is TemporaryError
    hub.requests.clear()
    push(out, TARGET)
    assert (len(sent(hub)), len(commits(hub))) == (0, 1)


def test_files_of_the_checkpoint_before_go_and_others_stay(hub: LocalHub, out: Path, tmp_path: Path) -> None:
    push(out, TARGET)
    repository = hub.repositories[TARGET]
    repository.push({**head(hub), "notes.txt": b"mine", "model-00009-of-00009.i4.safetensors": b"mine too"})
    single = write_checkpoint(tmp_path / "single", shards=1)
    (single / "LICENSE").unlink()
    convert_folder(single, tmp_path / "again")
    push(tmp_path / "again", TARGET)
    others = {"notes.txt", "model-00009-of-00009.i4.safetensors", CARD_NAME}
    assert head(hub).keys() == {*NEW, *contents(tmp_path / "again"), *others}
    assert len(commits(hub)) == 2


def test_files_of_a_repository_whose_manifest_is_of_something_else_stay(hub: LocalHub, out: Path) -> None:
    hub.repositories[TARGET] = Repository()
    hub.repositories[TARGET].push({MANIFEST_NAME: b'{"files": [{"name": "a.txt"}]}', "a.txt": b"mine"})
    push(out, TARGET)
    assert head(hub)["a.txt"] == b"mine"


def test_a_repository_with_other_weights_is_refused_before_anything_is_sent(hub: LocalHub, out: Path) -> None:
    hub.push({"model.safetensors": b"weights", "config.json": b"{}"})
    error = error_of(out, REPO)
    assert (type(error), error.exit_code) == (HubError, 4)
    assert "holds the weights of another model (model.safetensors)" in str(error)
    assert not sent(hub) + commits(hub)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "model.gguf", "consolidated.safetensors", "adapter_model.safetensors",
        "model.fp16.safetensors", "model.safetensors.index.json",
    ],
)  # fmt: skip
def test_weights_under_any_name_are_those_of_another_model(hub: LocalHub, out: Path, name: str) -> None:
    hub.push({name: b"weights", "config.json": b"{}"})
    assert f"holds the weights of another model ({name})" in str(error_of(out, REPO))


def test_weights_of_a_folder_are_no_other_model(hub: LocalHub, out: Path) -> None:
    hub.push({"onnx/model.onnx": b"weights", "vae/model.safetensors": b"weights"})
    push(out, REPO)
    assert MANIFEST_NAME in head(hub, REPO)


def test_a_repository_that_changes_meanwhile_is_not_overwritten(hub: LocalHub, out: Path) -> None:
    def change(request: Request) -> None:
        if request.path.endswith("/objects/batch"):
            hub.repositories[TARGET].push({"notes.txt": b"mine"})

    hub.on_request = change
    assert type(error_of(out, TARGET)) is TemporaryError
    assert head(hub) == {"notes.txt": b"mine"}


def test_a_private_repository_is_made_private(hub: LocalHub, out: Path) -> None:
    push(out, TARGET, "--private")
    push(out, "owner/public")
    assert (hub.repositories[TARGET].private, hub.repositories["owner/public"].private) == (True, False)


def test_nothing_that_is_to_be_private_goes_to_a_public_repository(hub: LocalHub, out: Path) -> None:
    hub.repositories[TARGET] = Repository()
    hub.repositories[TARGET].push(NEW)
    error = error_of(out, TARGET, "--private")
    assert type(error) is UsageError
    assert "exists already, for all to see" in str(error)
    assert head(hub) == NEW


def test_a_pull_request_leaves_the_branch_alone(hub: LocalHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(out, TARGET, "--create-pr")
    assert head(hub) == NEW
    assert hub.repositories[TARGET].files("refs/pr/1").keys() == {*NEW, *contents(out)}
    assert capsys.readouterr().out == f"{TARGET}: {hub.url}/{TARGET}/discussions/1\n"


def test_a_pull_request_is_made_once(hub: LocalHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(out, TARGET, "--create-pr")
    capsys.readouterr()
    push(out, TARGET, "--create-pr")
    assert len(commits(hub)) == 1
    assert capsys.readouterr().out == f"{TARGET}: {hub.url}/{TARGET}/discussions/1\n"


def test_a_pull_request_of_other_files_is_another(hub: LocalHub, out: Path) -> None:
    push(out, TARGET, "--create-pr")
    (out / CARD_NAME).write_text("Mine.\n")
    push(out, TARGET, "--create-pr")
    assert hub.repositories[TARGET].files("refs/pr/2")[CARD_NAME] == b"Mine.\n"


def test_a_name_without_owner_is_the_users_own(hub: LocalHub, out: Path) -> None:
    push(out, "model-i4")
    assert MANIFEST_NAME in head(hub, "me/model-i4")
    assert b'runtime.load("me/model-i4")' in head(hub, "me/model-i4")[CARD_NAME]


def test_offline_is_a_usage_error(hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = error_of(out, TARGET)
    assert type(error) is UsageError
    assert "HF_HUB_OFFLINE" in str(error)
    assert not hub.requests


def test_a_malformed_name_is_a_usage_error(hub: LocalHub, out: Path) -> None:
    assert type(error_of(out, "owner/na me")) is UsageError
    assert not hub.requests


@pytest.mark.parametrize("name", [SHARDS[1], "tokenizer.json"])
def test_a_damaged_folder_is_refused_before_the_hub_is_asked(hub: LocalHub, out: Path, name: str) -> None:
    data = bytearray((out / name).read_bytes())
    data[-1] ^= 1
    (out / name).write_bytes(data)
    assert type(error_of(out, TARGET)) is CheckpointError
    assert not hub.requests


@pytest.mark.parametrize("name", [SHARDS[1], "tokenizer.json"])
def test_a_file_that_changes_behind_its_verification_is_not_committed(hub: LocalHub, out: Path, name: str) -> None:
    data = bytearray((out / name).read_bytes())
    data[-1] ^= 1
    with Upload(TARGET) as upload, pytest.raises(CheckpointError, match="nothing is committed"):
        (out / name).write_bytes(data)
        upload.commit(out, read_manifest(out))
    assert head(hub) == NEW


STATUSES = {401: HubError, 403: HubError, 404: HubError, 409: TemporaryError, 412: TemporaryError,
            429: TemporaryError, 500: TemporaryError, DROP: TemporaryError}  # fmt: skip
CREATE = "/api/repos/create"
STEPS = (CREATE, "*/preupload/*", "*/objects/batch", "/uploads/*", COMMIT)


# That a repository exists already is no error.
@pytest.mark.parametrize(
    ("path", "status"), [(path, status) for path in STEPS for status in STATUSES if (path, status) != (CREATE, 409)]
)
def test_errors_of_the_hub_keep_their_kind_and_no_token(
    hub: LocalHub, out: Path, caplog: pytest.LogCaptureFixture, path: str, status: int
) -> None:
    hub.fail(status, path=path, message=f"Bearer {TOKEN}")
    error = error_of(out, TARGET)
    assert type(error) is STATUSES[status]
    assert TARGET in str(error)
    assert TOKEN not in str(error) + caplog.text
    assert {request.authorization for request in hub.requests if request.method == "POST"} <= {f"Bearer {TOKEN}", None}


def test_a_card_that_the_hub_refuses_is_an_error_before_anything_large_is_sent(hub: LocalHub, out: Path) -> None:
    hub.invalid_card = "license must be one of [mit]"
    error = error_of(out, TARGET)
    assert type(error) is HubError
    assert "Invalid metadata in README.md. - license must be one of [mit]; put a README.md" in str(error)
    assert not sent(hub)


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "Qwen2VLForConditionalGeneration"),
        ({"architectures": [3]}, "AutoModelForCausalLM"),
        ({}, "AutoModelForCausalLM"),
    ],
)
def test_the_card_loads_the_class_that_the_configuration_names(
    hub: LocalHub, source: Path, tmp_path: Path, config: dict[str, object], model_class: str
) -> None:
    add_to_config(source, **config)
    convert_folder(source, tmp_path / "other")
    push(tmp_path / "other", TARGET)
    assert f"model = {model_class}.from_pretrained(" in head(hub)[CARD_NAME].decode()


def test_a_card_that_somebody_wrote_goes_as_it_is(hub: LocalHub, out: Path) -> None:
    (out / CARD_NAME).write_text("---\nlicense: apache-2.0\n---\nMine.\n")
    push(out, TARGET)
    assert head(hub)[CARD_NAME] == b"---\nlicense: apache-2.0\n---\nMine.\n"


def test_a_snapshot_can_be_published_with_the_card_that_it_has(hub: LocalHub, out: Path) -> None:
    push(out, TARGET)
    push(download(TARGET), "owner/copy")
    assert head(hub, "owner/copy") == head(hub)


def test_a_card_of_the_source_that_is_gone_is_missed(hub: LocalHub, out: Path) -> None:
    (out / CARD_NAME).unlink()
    assert "which named the licence of the source" in str(error_of(out, TARGET))


def test_figures_in_the_folder_come_into_the_card_and_do_not_go_up(hub: LocalHub, out: Path) -> None:
    figures = {
        "checkpoint": read_manifest(out).digest, "text": "novels.txt", "windows": 2, "seq_len": 8, "dtype": "float32",
        "device": "cpu", "perplexity": 26.141, "perplexity_se": None,
    }  # fmt: skip
    (out / EVALUATION_NAME).write_text(json.dumps(figures))
    push(out, TARGET)
    assert b"| perplexity | 26.141 |" in head(hub)[CARD_NAME]
    assert EVALUATION_NAME not in head(hub)


def test_an_evaluation_of_the_source_is_a_file_like_others(hub: LocalHub, source: Path, tmp_path: Path) -> None:
    (source / EVALUATION_NAME).write_text('{"accuracy": 1}')
    convert_folder(source, tmp_path / "other")
    push(tmp_path / "other", TARGET)
    assert b"## Evaluation" not in head(hub)[CARD_NAME]
    assert head(hub)[EVALUATION_NAME] == b'{"accuracy": 1}'


def test_a_conversion_that_publishes_leaves_what_the_two_commands_leave(
    hub: LocalHub, source: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "together", "--push-to", TARGET)
    assert f"{TARGET}: {hub.url}/{TARGET}/commit/" in capsys.readouterr().out
    assert len(sent(hub)) == 2
    push(tmp_path / "together", "owner/afterwards")
    assert {**head(hub), CARD_NAME: b""} == {**head(hub, "owner/afterwards"), CARD_NAME: b""}
    assert contents(tmp_path / "together") == contents(out)


def test_a_conversion_says_in_one_object_what_it_did_and_where_that_is(
    hub: LocalHub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "out", "--push-to", TARGET, "--json")
    fields = json.loads(capsys.readouterr().out)
    commit = hub.repositories[TARGET].branches["main"]
    assert (fields["repo_id"], fields["url"]) == (TARGET, f"{hub.url}/{TARGET}/commit/{commit}")
    assert fields["quantized"] == 2


def test_a_conversion_says_what_it_did_where_it_cannot_be_published(
    hub: LocalHub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail(403, path=COMMIT)
    with pytest.raises(HubError):
        convert(source, tmp_path / "out", "--push-to", TARGET, "--json")
    fields = json.loads(capsys.readouterr().out)
    assert fields["quantized"] == 2
    assert fields.keys().isdisjoint({"repo_id", "url"})


def test_a_conversion_from_the_hub_names_its_base_model(hub: LocalHub, source: Path, tmp_path: Path) -> None:
    hub.push(contents(source))
    convert(REPO, tmp_path / "out", "--push-to", TARGET, "--private")
    data = ModelCard(head(hub)[CARD_NAME].decode()).data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (REPO, "quantized", "mit")
    assert hub.repositories[TARGET].private


def test_a_shard_is_sent_while_the_next_is_converted(
    hub: LocalHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, convert_chunk = Event(), Conversion.convert

    def note(request: Request) -> None:
        if request.method == "PUT":
            arrived.set()

    def waiting(self: Conversion, chunk: memoryview) -> object:
        assert self.plan.name != "lm_head.weight" or arrived.wait(10)  # the second shard's
        return convert_chunk(self, chunk)

    hub.on_request = note
    monkeypatch.setattr(Conversion, "convert", waiting)
    convert(source, tmp_path / "out", "--push-to", TARGET)
    assert len(commits(hub)) == 1


def test_an_upload_that_fails_leaves_the_checkpoint_and_says_how_to_go_on(
    hub: LocalHub, source: Path, tmp_path: Path
) -> None:
    hub.fail(403, path=COMMIT, times=1)
    with pytest.raises(HubError, match=rf"int4-push {tmp_path}/out {TARGET} goes on"):
        convert(source, tmp_path / "out", "--push-to", TARGET)
    Checkpoint(tmp_path / "out").verify()
    hub.requests.clear()
    push(tmp_path / "out", TARGET)
    assert (len(sent(hub)), len(commits(hub))) == (0, 1)


def test_an_upload_that_fails_beside_the_conversion_is_made_up_for(hub: LocalHub, source: Path, tmp_path: Path) -> None:
    hub.fail(500, path="*/objects/batch", times=6)
    convert(source, tmp_path / "out", "--push-to", TARGET)
    assert set(SHARDS) <= head(hub).keys()


def test_shards_of_an_interrupted_conversion_are_published_with_the_others(
    hub: LocalHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_chunk = Copied.convert

    def failing(self: Copied, chunk: memoryview) -> object:
        if self.plan.name == "lm_head.weight":
            raise CheckpointError("stopped")
        return convert_chunk(self, chunk)

    with monkeypatch.context() as patched, pytest.raises(CheckpointError):
        patched.setattr(Copied, "convert", failing)
        convert(source, tmp_path / "out", "--push-to", TARGET)
    assert head(hub) == NEW
    convert(source, tmp_path / "out", "--push-to", TARGET)
    assert set(SHARDS) <= head(hub).keys()


def test_no_right_to_write_is_an_error_before_the_conversion(hub: LocalHub, source: Path, tmp_path: Path) -> None:
    hub.fail(403, path="/api/repos/create")
    with pytest.raises(HubError, match="that your token may write there"):
        convert(source, tmp_path / "out", "--push-to", TARGET)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_publishes_nothing(hub: LocalHub, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "--push-to", TARGET, "--dry-run")
    assert not hub.requests


@pytest.mark.parametrize("option", ["--private", "--create-pr"])
def test_how_to_publish_without_where_is_a_usage_error(source: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(UsageError, match="--push-to"):
        convert(source, tmp_path / "out", option)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_progress_bars_unless_quiet(
    hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    push(out, TARGET, *["--quiet"] * quiet)
    assert ("Upload 2 LFS files" in capsys.readouterr().err) is not quiet
    assert not are_progress_bars_disabled()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_pipe_gets_no_progress_bars_and_quiet_nothing(
    hub: LocalHub, out: Path, capfd: pytest.CaptureFixture[str], quiet: bool
) -> None:
    push(out, TARGET, *["--quiet"] * quiet)
    printed = capfd.readouterr()
    assert (printed.out == "", printed.err) == (quiet, "")
