import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import EXAMPLE, contents, random, write_checkpoint
from safetensors.torch import load_file

import converter.cli
import converter.export_cli
import converter.push_cli
import formats.cli
import runtime.cli
from converter.card import make_card
from formats.errors import TemporaryError, UsageError
from formats.manifest import MANIFEST_NAME, read_manifest

MAINS = {
    "int4-convert": converter.cli.main,
    "int4-export": converter.export_cli.main,
    "int4-push": converter.push_cli.main,
    "int4-inspect": formats.cli.main,
    "int4-eval": runtime.cli.main,
}


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Call = Callable[..., Result]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(command: str, *arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as exit_info:
                MAINS[command]()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        captured = capsys.readouterr()
        return Result(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


def test_convert_says_what_it_did(call: Call, source: Path, out: Path) -> None:
    result = call("int4-convert", source, out, "--group-size", 8, "--device", "cpu")
    assert result.code == 0
    assert re.fullmatch(
        r".*/out: 2 tensors quantised at 6\.\d\d bits a weight, 4 kept, 0\.0 MB -> 0\.0 MB .*, \d+\.\d s on cpu "
        r"with at most \d+\.\d GB of memory\n",
        result.out,
    )
    assert result.err == ""  # it takes no time that a log would have to be told of


def test_convert_quiet_says_nothing(call: Call, source: Path, out: Path) -> None:
    result = call("int4-convert", source, out, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize("command", ["int4-inspect", "int4-eval"])
def test_quiet_is_the_same_for_every_command(call: Call, converted: Path, command: str) -> None:
    text = ["--text", EXAMPLE.parent / "tiny-llama.heldout.txt", "--seq-len", 64, "--max-windows", 1]
    result = call(command, converted, "--quiet", *(text if command == "int4-eval" else []))
    assert (result.code, result.out, result.err) == (0, "", "")


def test_convert_json_is_the_summary(call: Call, source: Path, out: Path) -> None:
    fields = json.loads(call("int4-convert", source, out, "--json", "--group-size", 8).out)
    assert fields.keys() == {
        "quantized", "kept", "bits_per_weight", "source_bytes", "stored_bytes", "seconds", "peak_host_bytes",
        "peak_gpu_bytes",
    }  # fmt: skip
    assert fields["peak_host_bytes"] > 10e6
    assert (fields["quantized"], fields["kept"]) == (2, 4)


def test_dry_run_lists_every_tensor_and_writes_nothing(call: Call, source: Path, out: Path) -> None:
    result = call("int4-convert", source, out, "--dry-run")
    assert result.code == 0
    assert "int4  model.layers.0.q_proj.weight  BF16 [16, 24]  (linear layer)" in result.out
    assert "keep  lm_head.weight  BF16 [32, 24]  (output head)" in result.out
    assert "would write: 2 tensors quantised" in result.out
    assert not out.exists()


def test_a_model_goes_to_another_format_and_back(call: Call, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {"a.weight": random(16, 64)}, shards=1)
    first, theirs, second = (tmp_path / name for name in ("first", "theirs", "second"))
    assert call("int4-convert", source, first, "--group-size", 32).code == 0
    assert call("int4-export", first, theirs, "--to", "gptq").code == 0
    assert call("int4-convert", theirs, second, "--method", "absmax").code == 2
    assert "1 tensors taken over at 4.50 bits a weight, 0 kept, 0.0 MB," in call("int4-convert", theirs, second).out
    assert "relayout of gptq, symmetric, groups of 32" in call("int4-inspect", second, "--verify", "--errors").out
    assert (first / "model.i4.safetensors").read_bytes() == (second / "model.i4.safetensors").read_bytes()


def test_only_checkpoints_of_this_format_are_exported(call: Call, source: Path, out: Path) -> None:
    result = call("int4-export", source, out, "--to", "awq")
    assert (result.code, result.out, out.exists()) == (3, "", False)
    assert "holds no manifest.json" in result.err


def test_dry_run_json_has_the_plan(call: Call, source: Path, out: Path) -> None:
    fields = json.loads(call("int4-convert", source, out, "--dry-run", "--json").out)
    assert {tensor["name"]: tensor["quantized"] for tensor in fields["tensors"]}["lm_head.weight"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", 0], "group size 0"),
        (["--group-size", 7], "group size 7"),
        (["--group-size", 1 << 70], f"group size {1 << 70}"),
        (["--seed", 1 << 70], "is not in the range"),
        (["--scheme", "odd"], "'odd' is not one of"),
        (["--method", "magic"], "'magic' is not"),
        (["--include", "nothing"], "matches no tensor"),
        (["--exclude", "re:("], "no regular expression"),
        (["--revision", "main"], "leave --revision out"),
        (["--seq-len", 512, "--seed", 0], "--seq-len, --seed: of which text? give --calibration"),
        (["--calibration-tokens", 9], "--calibration-tokens: of which text?"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--device", "meta"], "device 'meta'"),
        (["--device", "hpu"], "device 'hpu'"),
        (["--device", ""], "device ''"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_wrong_use_ends_with_2(call: Call, source: Path, out: Path, arguments: list[object], message: str) -> None:
    result = call("int4-convert", source, out, *arguments)
    assert result.code == 2
    assert message in result.err
    assert not out.exists()


def test_a_bad_checkpoint_ends_with_3_and_one_line(call: Call, tmp_path: Path, out: Path) -> None:
    weight = random(8, 8)
    weight[0, 0] = float("nan")
    result = call("int4-convert", write_checkpoint(tmp_path / "s", {"a.weight": weight}, shards=1), out)
    assert result.code == 3
    assert re.fullmatch(r"error: tensor 'a\.weight': 1 of 64 weights .*\n", result.err)


def test_a_bad_output_folder_ends_with_5(call: Call, source: Path) -> None:
    result = call("int4-convert", source, source / "out")
    assert (result.code, result.err.count("\n")) == (5, 1)


def test_a_passing_trouble_ends_with_75(call: Call, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*args: object, **kwargs: object) -> None:
        raise TemporaryError("busy")

    monkeypatch.setattr(converter.cli, "open_source", busy)
    assert call("int4-convert", source, out).code == 75


def test_an_interrupt_ends_with_130(call: Call, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converter.cli, "convert", interrupt)
    result = call("int4-convert", source, out)
    advice = "the same command goes on behind the files that are finished"
    assert (result.code, result.err) == (130, f"\ninterrupted; {advice}\n")


WAITING = """
import signal, time, click
from formats.command import run

@click.command()
def wait() -> None:
    try:
        print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)
        time.sleep(60)
    finally:
        print("unwinding", flush=True)
        time.sleep(60)

run(wait)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_what_the_first_began(signum: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        process.send_signal(signum)
        assert process.stdout.readline() == "unwinding\n"
        process.send_signal(signum)
        assert process.wait(timeout=30) == -signum


def test_what_a_shell_runs_in_the_background_is_not_interrupted() -> None:
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WAITING
    with subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        process.kill()


def test_a_warning_is_one_line_and_stops_nothing(call: Call, source: Path, out: Path) -> None:
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": {"total_size": 5}}))
    result = call("int4-convert", source, out)
    assert result.code == 0
    assert re.fullmatch(r"warning: .*index.json: total_size is 5, its shards hold \d+ bytes; .*\n", result.err)


CONVERTING = """
import signal, time
from converter.cli import main
from converter.pipeline import Conversion

convert = Conversion.convert

def waiting(self, chunk):
    print("at a chunk", flush=True)
    while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # until the first has come
        time.sleep(0.01)
    return convert(self, chunk)

Conversion.convert = waiting
main()
"""


def test_a_termination_ends_with_143_and_leaves_nothing_half_made(source: Path, out: Path) -> None:
    command = [sys.executable, "-c", CONVERTING, str(source), str(out), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at a chunk\n"
        assert list(out.glob("*.partial"))
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.startswith("terminated; the same command goes on")) == (143, True)
    assert not any(name.endswith((".partial", MANIFEST_NAME)) for name in contents(out))
    for shard in out.glob("*.safetensors"):  # one that was about to end may have ended
        assert load_file(shard)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    subprocess.run([sys.executable, "-m", "converter", str(EXAMPLE), str(out), "--quiet"], check=True)
    return out


def test_a_folder_that_is_no_checkpoint_is_not_published(call: Call, source: Path) -> None:
    result = call("int4-push", source, "owner/name")
    assert (result.code, result.out) == (3, "")
    assert f"{source}: holds no manifest.json" in result.err


def test_inspect_describes_the_checkpoint(call: Call, converted: Path) -> None:
    result = call("int4-inspect", converted, "--verify")
    assert result.code == 0
    for line in (
        "source     tiny-llama",
        "recipe     search, symmetric, groups of 256, by int4-convert ",
        "quantised  21 tensors, 4.0",
        "model.layers.*.self_attn.q_proj.weight          3 ×  [256, 256]   int4   4.06     1.",
        "model.embed_tokens.weight                       1 ×  [1024, 256]  BF16  16.00  kept: embedding\n",
        "verified: ",
    ):
        assert line in result.out


def test_inspect_keeps_apart_what_only_shares_a_name(call: Call, tmp_path: Path, out: Path) -> None:
    tensors = {"a.0.b.weight": random(16, 24), "a.10.b.weight": random(16, 24), "a.2.b.weight": random(8, 24)}
    call("int4-convert", write_checkpoint(tmp_path / "source", tensors | {"a.3x.b.weight": random(8, 24)}), out)
    rows = [line.split()[:5] for line in call("int4-inspect", out).out.split("\n\n")[1].splitlines()[1:]]
    assert sorted(rows) == [
        ["a.*.b.weight", "1", "×", "[8,", "24]"],
        ["a.*.b.weight", "2", "×", "[16,", "24]"],
        ["a.3x.b.weight", "1", "×", "[8,", "24]"],
    ]


def test_inspect_fits_names_into_a_narrow_terminal(
    call: Call, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("int4-inspect", converted).out.split("\n\n")[1].splitlines()
    assert "model.laye…lf_attn.q_proj.weight  3 ×  [256, 256]   int4   4.06" in "\n".join(lines)
    assert 70 < max(map(len, lines)) <= 80


def test_inspect_shows_the_errors_with_the_worst_first(call: Call, converted: Path) -> None:
    result = call("int4-inspect", converted, "--errors")
    assert result.code == 0
    _, table = result.out.split("relative MSE    cosine   clipped  tensor\n")
    rows = [line.split() for line in table.splitlines()]
    assert len(rows) == 21
    figures = [float(row[0]) for row in rows]
    assert figures == sorted(figures, reverse=True)
    assert all(0.98 < float(row[1]) <= 1 and row[2].endswith("%") and row[3].endswith(".weight") for row in rows)


def test_inspect_json_holds_the_manifest(call: Call, converted: Path) -> None:
    fields = json.loads(call("int4-inspect", converted, "--json").out)
    manifest = json.loads((converted / MANIFEST_NAME).read_text())
    assert manifest.items() <= fields.items()
    assert (fields["quantized"], fields["verified"]) == (21, False)


def test_inspect_of_a_damaged_checkpoint_ends_with_3(call: Call, source: Path, out: Path) -> None:
    call("int4-convert", source, out, "--quiet")
    with (out / "tokenizer.json").open("r+b") as file:
        file.write(b"[")
    assert call("int4-inspect", out).code == 0
    result = call("int4-inspect", out, "--verify")
    assert result.code == 3
    assert re.fullmatch(r"error: .*tokenizer.json: SHA-256 is .*fetch it again\n", result.err)


def test_inspect_prints_what_a_file_says_as_harmless_text(call: Call, converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path / "out")
    manifest = read_manifest(converted)
    source = replace(manifest.source, id="\x1b[31mred\nsize 0\ud800")
    (tmp_path / "out" / MANIFEST_NAME).write_bytes(replace(manifest, source=source).to_bytes())
    assert call("int4-inspect", tmp_path / "out").out.startswith("source     \\x1b[31mred\\nsize 0\\ud800\n")


def test_an_error_is_one_line_of_bounded_length(call: Call, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise TemporaryError("\x1b[31m\n\ud800" + "a" * 10**6)

    monkeypatch.setattr(converter.cli, "open_source", fail)
    error = call("int4-convert", source, "out").err
    assert error.startswith(r"error: \x1b[31m\n\ud800aaa")
    assert (len(error) < 1100, error.count("\n")) == (True, 1)


def inspect_into(stdout: int, folder: Path) -> tuple[int, str]:
    program = "from formats.cli import main; main()"
    command = [sys.executable, "-c", program, str(folder)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    return done.returncode, done.stderr


def test_a_pipe_whose_reader_has_enough_ends_with_5_and_without_a_word(converted: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code, error = inspect_into(writer, converted)
    os.close(writer)
    assert (code, error) == (5, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_standard_output_ends_with_5_and_one_line(converted: Path) -> None:
    with Path("/dev/full").open("w") as full:
        code, error = inspect_into(full.fileno(), converted)
    assert (code, error.count("\n"), "No space left on device" in error) == (5, 1, True)


def test_eval_draws_a_report(call: Call, converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = EXAMPLE.parent / "tiny-llama.heldout.txt"
    arguments = ["--text", text, "--seq-len", 64, "--max-windows", 2, "--report", tmp_path / "report"]
    result = call("int4-eval", converted, *arguments)
    assert result.code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert result.out.splitlines()[0] in page  # the table that was printed
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"model", "layers", "times"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="written for a CPU")
def test_eval_prints_a_table_and_writes_json(call: Call, converted: Path, tmp_path: Path) -> None:
    text = EXAMPLE.parent / "tiny-llama.heldout.txt"
    result = call(
        "int4-eval", converted, "--reference", EXAMPLE, "--text", text, "--seq-len", 64, "--max-windows", 8,
        "--batch-size", 4, "--dtype", "float32", "--json", tmp_path / "eval.json",
    )  # fmt: skip
    assert result.code == 0
    assert "8 windows of 64 tokens, float32, cpu" in result.out
    fields = json.loads((tmp_path / "eval.json").read_text())
    figures = {"perplexity", "perplexity_se", "tokens", "tokens_per_second", "weight_bytes", "peak_memory_bytes"}
    assert figures <= fields.keys()
    assert fields["reference"].keys() == figures
    assert fields["kld"].keys() == {"mean", "mean_se", "median", "p999", "histogram"}
    assert fields["increase"] == pytest.approx(fields["perplexity"] / fields["reference"]["perplexity"] - 1)
    assert 0 < fields["increase_se"] < fields["perplexity_se"]
    assert fields["tokens"] == fields["reference"]["tokens"] == 8 * 63
    assert 1 < fields["perplexity"] / fields["reference"]["perplexity"] < 1.3
    assert 0 < fields["kld"]["mean"] < 0.3
    assert 0.7 < fields["same_top1"] < 1
    assert fields["weight_bytes"] < fields["reference"]["weight_bytes"]
    assert f"| perplexity | {fields['perplexity']:.3f} ±" in make_card("me/x", read_manifest(converted), "", fields)


@pytest.mark.parametrize("texts", [[], ["--text", EXAMPLE / "config.json", "--dataset", "wikitext2"]])
def test_eval_needs_exactly_one_text(call: Call, converted: Path, texts: list[object]) -> None:
    result = call("int4-eval", converted, *texts)
    assert (result.code, "give a text" in result.err) == (2, True)


@pytest.mark.parametrize(("options", "join"), [([], None), (["--no-join"], False)])
def test_eval_joins_layers_unless_told_otherwise(
    call: Call, converted: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], join: bool | None
) -> None:
    def load(*args: object, join: bool | None, **kwargs: object) -> None:
        raise UsageError(f"join is {join}")

    monkeypatch.setattr(runtime.cli, "load", load)
    result = call("int4-eval", converted, "--text", EXAMPLE / "config.json", "--seq-len", 64, *options)
    assert f"join is {join}" in result.err


HELD_OUT = EXAMPLE.parent / "tiny-llama.heldout.txt"


@pytest.mark.parametrize(
    ("batch", "windows", "advice"),
    [
        (1, 4, "give --batch-size 4 or more\n"),
        (8, 1, "--batch-size 4 or more, and as many windows, of which there are 1"),
    ],
)
def test_eval_refuses_fp8_where_it_makes_no_difference(
    call: Call, converted: Path, batch: int, windows: int, advice: str
) -> None:
    pytest.importorskip("transformers")
    options = ["--seq-len", 256, "--max-windows", windows, "--batch-size", batch, "--activations", "fp8"]
    result = call("int4-eval", converted, "--text", HELD_OUT, *options)
    assert (result.code, advice in result.err) == (2, True)


def test_eval_says_with_which_options_it_ran(call: Call, converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = ["--seq-len", 256, "--max-windows", 4, "--batch-size", 4, "--activations", "fp8", "--no-join"]
    result = call("int4-eval", converted, "--text", HELD_OUT, *options, "--json", tmp_path / "eval.json")
    assert result.out.splitlines()[0].endswith(", fp8 activations, layers not joined")
    fields = json.loads((tmp_path / "eval.json").read_text())
    assert (fields["activations"], fields["join"]) == ("fp8", False)


def test_windows_are_no_longer_than_the_model_has_positions(call: Call, converted: Path) -> None:
    pytest.importorskip("transformers")
    result = call("int4-eval", converted, "--text", HELD_OUT, "--max-windows", 1)
    assert (result.out.startswith("1 windows of 512 tokens, "), result.err) == (True, "")


def test_eval_warns_of_more_positions_than_the_model_was_made_for(call: Call, converted: Path) -> None:
    pytest.importorskip("transformers")
    result = call("int4-eval", converted, "--text", HELD_OUT, "--max-windows", 1, "--seq-len", 600)
    assert (result.code, result.out.startswith("1 windows of 600 tokens, ")) == (0, True)
    assert result.err.startswith("warning: --seq-len 600: more than the 512 positions that the model was made for;")


def test_eval_finds_a_folder_in_the_place_of_its_figures_before_it_begins(call: Call, tmp_path: Path) -> None:
    result = call("int4-eval", "no/such/model", "--text", HELD_OUT, "--json", tmp_path)
    assert (result.code, "is a directory" in result.err) == (2, True)


def untrained(call: Call, folder: Path, architecture: str, **fields: object) -> Path:
    """An int4 checkpoint of a tiny random model with the tokenizer of the example; its source is beside it."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, architecture)
    torch.manual_seed(0)
    model(model.config_class(**fields)).save_pretrained(folder / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "source" / name).write_bytes((EXAMPLE / name).read_bytes())
    call("int4-convert", folder / "source", folder / "out", "--group-size", 8, "--quiet")
    return folder / "out"


SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
PICTURES = {name: SIZES[name] for name in SIZES if name != "vocab_size"} | {"image_size": 32, "patch_size": 16}


def test_eval_refuses_tokens_that_the_model_lacks(call: Call, tmp_path: Path) -> None:
    out = untrained(call, tmp_path, "LlamaForCausalLM", **{**SIZES, "vocab_size": 100})
    result = call("int4-eval", out, "--text", HELD_OUT, "--seq-len", 64)
    assert (result.code, "its model knows 100" in result.err) == (3, True)


def test_eval_refuses_positions_that_the_model_lacks(call: Call, tmp_path: Path) -> None:
    sizes = {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 16}
    out = untrained(call, tmp_path, "OPTForCausalLM", **sizes)
    result = call("int4-eval", out, "--text", HELD_OUT, "--seq-len", 64)
    assert (result.code, "the model has 16 positions" in result.err) == (2, True)


def test_eval_refuses_a_model_that_does_not_say_where_its_tokens_go(call: Call, tmp_path: Path) -> None:
    out = untrained(call, tmp_path, "CLIPModel", text_config=SIZES, vision_config=PICTURES)
    result = call("int4-eval", out, "--text", HELD_OUT)
    assert (result.code, "error: CLIPModel cannot be evaluated on a text" in result.err) == (2, True)


LLAVA = {
    "text_config": {**SIZES, "model_type": "llama"},
    "vision_config": {**PICTURES, "model_type": "clip_vision_model"},
}


@pytest.mark.parametrize(
    ("architecture", "fields"), [("BertForMaskedLM", SIZES), ("LlavaForConditionalGeneration", LLAVA)]
)
def test_the_reference_is_of_the_class_of_the_model(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, fields: dict[str, object]
) -> None:
    def name_both(model: object, *args: object, reference: object, **options: object) -> None:
        raise UsageError(f"{type(model).__name__} beside {type(reference).__name__}")

    out = untrained(call, tmp_path, architecture, **fields)
    monkeypatch.setattr(runtime.cli, "evaluate", name_both)
    result = call("int4-eval", out, "--text", HELD_OUT, "--seq-len", 64, "--reference", tmp_path / "source")
    assert f"error: {architecture} beside {architecture}\n" in result.err


@pytest.mark.parametrize("command", sorted(MAINS))
def test_help_ends_with_0(call: Call, command: str) -> None:
    result = call(command, "--help")
    assert (result.code, "Usage:" in result.out) == (0, True)
