"""Calibration of the example model, three layers of 256 and 384 columns, with few tokens."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from checkpoints import EXAMPLE, contents, stored, write_checkpoint
from click.testing import CliRunner, Result
from torch import Tensor, nn

from converter.calibrate import Calibration, LayerReport, decoder_layers
from converter.cli import command
from converter.convert import convert, make_recipe
from converter.observe import Recorder, inputs_of, shared_inputs
from converter.plan import Plan, make_plan
from converter.prepared import FOLDER_NAME, PreparedLayers
from converter.source import Source, open_source
from formats.errors import CheckpointError, TemporaryError
from formats.files import PARTIAL_SUFFIX
from formats.layout import PACKED, Scheme
from formats.manifest import CalibrationRecord, Manifest, read_manifest
from formats.texts import drawn_windows, read_text, tokenize

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

TEXT = EXAMPLE.parent / "tiny-llama.heldout.txt"
RECORD = CalibrationRecord("0" * 64, 8, 64, 0)
Convert = Callable[..., Manifest]


@pytest.fixture(scope="module")
def opened() -> Source:
    return open_source(str(EXAMPLE))


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return drawn_windows(tokenize(EXAMPLE, read_text(TEXT)), RECORD.seq_len, RECORD.windows, RECORD.seed)


def plan_of(source: Source, method: str = "gptq", record: CalibrationRecord = RECORD) -> Plan:
    return make_plan(source, make_recipe(Scheme(64), method, (), (), record))


def errors_of(manifest: Manifest) -> dict[str, float]:
    return {row.name: row.error.output for row in manifest.tensors if row.error and row.error.output is not None}


@pytest.fixture(scope="module")
def calibrated(opened: Source, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    convert(opened, plan_of(opened), out, [torch.device("cpu")], windows=windows)
    return out


def test_every_matrix_has_the_error_of_its_outputs(calibrated: Path) -> None:
    manifest = read_manifest(calibrated)
    assert manifest.recipe.calibration == RECORD
    assert errors_of(manifest).keys() == {row.name for row in manifest.tensors if row.quantized}
    assert all(0 < error < 0.05 for error in errors_of(manifest).values())


def test_nothing_is_left_of_the_work(calibrated: Path) -> None:
    assert not [path for path in calibrated.iterdir() if path.name.startswith(".")]


def test_outputs_lose_less_than_by_weighted_search(
    calibrated: Path, opened: Source, windows: Tensor, tmp_path: Path
) -> None:
    manifest = convert(opened, plan_of(opened, "search"), tmp_path / "out", [torch.device("cpu")], windows=windows)
    plain, found = errors_of(manifest), errors_of(read_manifest(calibrated))
    first = [name for name in found if ".layers.0.self_attn.q_proj." in name or ".layers.0.self_attn.k_proj." in name]
    assert len(first) == 2
    assert all(found[name] < 0.8 * plain[name] for name in first)  # those behind get other inputs


def test_an_interrupted_run_goes_on_and_ends_the_same(
    calibrated: Path, opened: Source, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(report: LayerReport) -> None:
        if report.index == 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(opened, plan_of(opened), out, [torch.device("cpu")], windows=windows, calibrated=stop)
    assert not (out / "manifest.json").exists()
    made: list[int] = []
    write = PreparedLayers.write_layer
    monkeypatch.setattr(
        PreparedLayers, "write_layer", lambda self, index, *rest: (made.append(index), write(self, index, *rest))
    )
    convert(opened, plan_of(opened), out, [torch.device("cpu")], windows=windows)
    assert made == [2]
    assert contents(out) == contents(calibrated)


def test_other_options_begin_anew(opened: Source, windows: Tensor, tmp_path: Path) -> None:
    first, second = PreparedLayers(tmp_path, "one"), PreparedLayers(tmp_path, "two")
    first.write_layer(0, {})
    assert first.read_layer(0) == {}
    assert second.read_layer(0) is None
    assert second.find("a") is None


def test_only_files_of_layers_are_removed(tmp_path: Path) -> None:
    layers = PreparedLayers(tmp_path, "key")
    layers.write_layer(0, {})
    foreign = tmp_path / FOLDER_NAME / "notes.txt"
    foreign.write_text("mine")
    (tmp_path / FOLDER_NAME / f"layer-00001.safetensors.0123abcd{PARTIAL_SUFFIX}").touch()
    layers.clear()
    assert list((tmp_path / FOLDER_NAME).iterdir()) == [foreign]
    foreign.unlink()
    layers.clear()
    assert not (tmp_path / FOLDER_NAME).exists()


def test_a_file_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    layers = PreparedLayers(tmp_path, "key")
    layers.write_layer(0, {})
    path = next((tmp_path / FOLDER_NAME).iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert layers.read_layer(0) is None


def test_matrices_that_saw_too_few_tokens_go_by_search(opened: Source, windows: Tensor, tmp_path: Path) -> None:
    calibration = Calibration(opened, plan_of(opened), torch.device("cpu"))
    reports = list(calibration.run(windows[:5], PreparedLayers(tmp_path, "key")))  # 320 tokens, less than 384 columns
    assert [report.index for report in reports] == [0, 1, 2]
    assert [report.too_few for report in reports] == [(f"model.layers.{i}.mlp.down_proj.weight",) for i in range(3)]


@pytest.mark.gpu
def test_a_gpu_calibrates_as_well(calibrated: Path, opened: Source, windows: Tensor, tmp_path: Path) -> None:
    manifest = convert(opened, plan_of(opened), tmp_path / "out", [torch.device("cuda")], windows=windows)
    expected = errors_of(read_manifest(calibrated))
    for name, error in errors_of(manifest).items():
        assert error == pytest.approx(expected[name], rel=0.1)


@pytest.mark.parametrize("step", ["start", "inputs"])
def test_a_full_gpu_is_an_error_with_sizes(
    opened: Source, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*rest: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if step == "start":
        monkeypatch.setattr(Recorder, "forward", full)
    else:
        monkeypatch.setattr(Calibration, "inputs", full)
    with pytest.raises(TemporaryError, match=r"tiny-llama: calibration: CUDA .* allocate 2\.00 GiB"):
        convert(opened, plan_of(opened), tmp_path / "out", [torch.device("cpu")], windows=windows)


def test_layers_of_another_source_with_the_same_size_and_time_are_not_taken(
    windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    def note(self: Calibration, windows: Tensor, prepared: PreparedLayers) -> NoReturn:
        keys.append(prepared.key)
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibration, "run", note)
    folder = shutil.copytree(EXAMPLE, tmp_path / "source")
    path = folder / "model-00001-of-00002.safetensors"
    times, data = path.stat().st_mtime_ns, bytearray(path.read_bytes())
    for bit in (0, 1, 1):
        data[-1] ^= bit
        path.write_bytes(data)
        os.utime(path, ns=(times, times))
        source = open_source(str(folder))
        with pytest.raises(KeyboardInterrupt):
            convert(source, plan_of(source), tmp_path / "out", [torch.device("cpu")], windows=windows)
    assert keys[0] == keys[2] != keys[1]


def test_without_transformers_the_command_names_the_extra(tmp_path: Path) -> None:
    program = "import sys; sys.modules['transformers'] = None\nfrom converter.cli import main\nmain()"
    command = [sys.executable, "-c", program, EXAMPLE, tmp_path / "out", "--method", "gptq", "--calibration", TEXT]
    done = subprocess.run([*map(str, command), "--device", "cpu"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install 'int4-convert[hf]'" in done.stderr


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.gate, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.gate(hidden) * self.up(hidden))  # type: ignore[no-any-return]


def plain_call(layer: nn.Module, hidden: Tensor) -> Tensor:
    return layer(hidden)  # type: ignore[no-any-return]


def test_layers_with_the_same_input_come_together_in_their_order() -> None:
    layer = Layer()
    found = shared_inputs(layer, dict(layer.named_children()), plain_call, torch.ones(1, 2, 4))  # type: ignore[arg-type]
    assert found == [["gate", "up"], ["down"], ["unused"]]


def test_the_input_of_a_layer_is_rows_of_tokens() -> None:
    layer, hidden = Layer(), torch.randn(2, 3, 4)
    found = inputs_of(layer, ["up", "unused"], plain_call, hidden)  # type: ignore[arg-type]
    assert torch.equal(found["up"], hidden.view(6, 4))
    assert found["unused"].shape == (0, 4)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no list of layers"):
        decoder_layers(Layer(), {"down.weight"})


def test_the_list_with_the_most_matrices_holds_the_layers() -> None:
    model = nn.Module()
    model.eyes, model.layers = nn.ModuleList([Layer()]), nn.ModuleList([Layer(), Layer()])
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert decoder_layers(model, names) == ("layers.", model.layers)


def random_source(folder: Path, config: str, fields: dict[str, int]) -> Source:
    torch.manual_seed(0)
    found = getattr(transformers, config)(vocab_size=64, **fields)
    transformers.AutoModelForCausalLM.from_config(found, dtype=torch.float32).save_pretrained(folder)
    return open_source(str(folder))


def test_stacks_that_cannot_be_taken_apart_go_by_search_and_are_named(tmp_path: Path) -> None:
    fields = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
              "intermediate_size_mlp": 96}  # fmt: skip
    source = random_source(tmp_path / "source", "Llama4TextConfig", fields)
    reports: list[LayerReport] = []
    tokens = torch.arange(8 * 32).view(8, 32) % 64
    manifest = convert(source, plan_of(source), tmp_path / "out", [torch.device("cpu")], windows=tokens,
                       calibrated=reports.append)  # fmt: skip
    stacks = [f"model.layers.{i}.feed_forward.experts.{leaf}_proj" for i in range(2) for leaf in ("down", "gate_up")]
    assert [name for report in reports for name in report.other] == stacks
    assert errors_of(manifest).keys() == {row.name for row in manifest.tensors if row.quantized} - set(stacks)
    plain = make_plan(source, make_recipe(Scheme(64), "search", (), ()))
    convert(source, plain, tmp_path / "search", [torch.device("cpu")])
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "search")
    assert all(torch.equal(found[name + PACKED], expected[name + PACKED]) for name in stacks)


def test_a_model_of_conv1d_alone_has_nothing_to_calibrate(tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", "GPT2Config", {"n_embd": 64, "n_layer": 1, "n_head": 4})
    with pytest.raises(CheckpointError, match="no list of layers that holds the linear layers to quantise"):
        Calibration(source, plan_of(source), torch.device("cpu"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments), "--device", "cpu"])


def test_the_command_names_the_text_in_the_recipe(tmp_path: Path) -> None:
    done = run(EXAMPLE, tmp_path / "out", "--method", "search", "--calibration", TEXT, "--calibration-tokens", 300,
               "--seq-len", 100, "--seed", 3)  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["calibration"]
    assert (record["windows"], record["seq_len"], record["seed"]) == (3, 100, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gptq"], "give --calibration FILE"),
        (["--method", "absmax", "--calibration", TEXT], "takes no text"),
        (["--method", "gptq", "--calibration", "nothing.txt"], "nothing.txt: is no file"),
        (["--method", "gptq", "--calibration", TEXT, "--seq-len", 10**7], "too few for a window"),
    ],
)
def test_texts_that_do_not_fit_the_method_are_refused(arguments: list[object], message: str, tmp_path: Path) -> None:
    done = run(EXAMPLE, tmp_path / "out", *arguments)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_model_is_refused(tmp_path: Path, windows: Tensor) -> None:
    source = open_source(str(write_checkpoint(tmp_path / "source")))
    with pytest.raises(
        CheckpointError, match=r"transformers cannot build the model .*convert it without --calibration"
    ):
        Calibration(source, plan_of(source), torch.device("cpu"))
