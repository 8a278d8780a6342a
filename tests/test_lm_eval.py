"""Tasks of lm-evaluation-harness: a task in a folder, without network."""

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import EXAMPLE, convert_folder
from click.testing import CliRunner, Result

import runtime
from converter.card import make_card
from formats.errors import TemporaryError, UsageError
from formats.layout import Scheme
from formats.manifest import read_manifest
from formats.texts import load_tokenizer
from runtime.cli import command
from runtime.integrations.lm_eval import Harness, Score, scores
from runtime.tables import task_table

QUESTIONS, CHOICES = 24, 4


def questions() -> list[dict[str, object]]:
    """Beginnings of sentences from the held-out text, each with its own end among those of three others."""
    words = (EXAMPLE.parent / "tiny-llama.heldout.txt").read_text().split()
    begins = [" ".join(words[i * 60 : i * 60 + 12]) for i in range(QUESTIONS)]
    ends = [" ".join(words[i * 60 + 12 : i * 60 + 16]) for i in range(QUESTIONS)]
    return [
        {"begin": begins[i], "ends": [ends[(i + j) % QUESTIONS] for j in range(CHOICES)], "right": 0}
        for i in range(QUESTIONS)
    ]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "ends.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions()))
    (folder / "ends.yaml").write_text(
        f"""
task: ends_of_sentences
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "ends.jsonl"}
  cache_dir: {tmp_path / "cache"}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{begin}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: right
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""
    )
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "out"
    convert_folder(EXAMPLE, out, Scheme(256))
    return out


@torch.no_grad()
def right_answers(model: torch.nn.Module) -> float:
    """The share of questions whose own end is the likeliest, without the harness."""
    tokenizer = load_tokenizer(EXAMPLE)

    def log_probability(begin: str, end: str) -> float:
        tokens = tokenizer(f"{begin} {end}", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(begin, add_special_tokens=False)["input_ids"])
        found = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        return sum(float(found[i - 1, tokens[i]]) for i in range(start, len(tokens)))

    found = [[log_probability(str(one["begin"]), end) for end in list(one["ends"])] for one in questions()]
    return sum(values[0] == max(values) for values in found) / len(found)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(command, list(map(str, arguments)))


def test_a_task_gives_the_share_of_right_answers(converted: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    model = runtime.load(converted, device="cpu", dtype=torch.float32)
    found = Harness(["ends_of_sentences"], folder=tasks).run(model, load_tokenizer(converted), batch_size=5)
    assert [(one.task, one.metric) for one in found] == [
        ("ends_of_sentences", "acc"),
        ("ends_of_sentences", "acc_norm"),
    ]
    share = right_answers(model)
    assert 1 / CHOICES < share < 1
    assert found[0].value == pytest.approx(share)
    assert found[0].stderr == pytest.approx((share * (1 - share) / (QUESTIONS - 1)) ** 0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="written for a CPU")
def test_eval_compares_tasks_with_those_of_the_original(converted: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    result = call(
        converted, "--reference", EXAMPLE, "--tasks", "ends_*", "--include-path", tasks, "--limit", 16,
        "--num-fewshot", 0, "--batch-size", 4, "--dtype", "float32", "--json", tmp_path / "eval.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    fields = json.loads((tmp_path / "eval.json").read_text())
    assert fields.keys() == {"tasks", "reference", "harness", "checkpoint", "dtype", "device", "activations"}
    assert "| ends_of_sentences | acc | " in make_card("me/x", read_manifest(converted), "", fields)
    assert (fields["harness"]["limit"], fields["harness"]["num_fewshot"]) == (16, 0)
    rows = zip(fields["tasks"], fields["reference"]["tasks"], strict=True)
    for line, (found, expected) in zip(result.stdout.splitlines()[1:], rows, strict=True):
        assert line.split() == [
            "ends_of_sentences", found["metric"], f"{found['value']:.4f}", "±", f"{found['stderr']:.4f}",
            f"{expected['value']:.4f}", "±", f"{expected['stderr']:.4f}",
        ]  # fmt: skip
    assert result.stderr == ""  # no bars of the harness, none of its warnings


def test_eval_prints_tasks_below_the_figures_of_a_text(converted: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    text = EXAMPLE.parent / "tiny-llama.heldout.txt"
    options = ["--text", text, "--seq-len", 64, "--max-windows", 2, "--json", tmp_path / "eval.json"]
    result = call(converted, "--tasks", "ends_of_sentences", "--include-path", tasks, "--limit", 2, *options)
    figures, scores = result.stdout.split("\n\n")
    assert figures.startswith("2 windows of 64 tokens")
    assert scores.startswith("task               metric")
    assert json.loads((tmp_path / "eval.json").read_text()).keys() >= {"perplexity", "windows", "tasks"}


def test_a_name_that_is_no_task_is_refused_before_the_model_is_loaded(converted: Path) -> None:
    pytest.importorskip("lm_eval")
    result = call("no/such/model", "--tasks", "arc_easy,helaswag")
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).startswith("--tasks: helaswag is no task of lm-evaluation-harness")


def test_tasks_without_their_data_are_a_temporary_error(converted: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    (tasks / "ends.jsonl").unlink()
    harness = Harness(["ends_of_sentences"], folder=tasks)
    with pytest.raises(TemporaryError, match="their data cannot be had"):
        harness.run(runtime.load(converted, device="cpu"), load_tokenizer(converted))


def test_without_the_harness_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'int4-convert\[lm-eval\]'"):
        Harness(["arc_easy"])


def test_a_full_gpu_is_an_error_with_sizes(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, names: list[str], **options: object) -> None: ...

        def run(self, *arguments: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("runtime.cli.Harness", Full)
    result = call(converted, "--tasks", "arc_easy", "--device", "cpu")
    assert isinstance(result.exception, TemporaryError)
    assert str(result.exception).startswith(f"{converted}: CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_page_needs_a_text(converted: Path, tmp_path: Path) -> None:
    result = call(converted, "--tasks", "arc_easy", "--report", tmp_path / "page")
    assert "--report draws what a text gives" in str(result.exception)


def test_figures_are_those_that_are_numbers() -> None:
    results = {
        "gsm8k": {
            "alias": "gsm8k", "sample_len": 4, "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.25,
        },
        "mmlu": {"alias": "mmlu", "acc,none": 1, "acc_stderr,none": "N/A"},
    }  # fmt: skip
    assert list(scores(results)) == [
        Score("gsm8k", "exact_match, strict-match", 0.5, 0.25), Score("mmlu", "acc", 1.0, None),
    ]  # fmt: skip


def test_figures_stand_in_columns() -> None:
    found = [Score("arc_easy", "acc", 0.5, 0.0123), Score("wiki", "word_perplexity", 12.5, None)]
    assert task_table(found, found).splitlines() == [
        "task      metric                       int4         reference",
        "arc_easy  acc               0.5000 ± 0.0123   0.5000 ± 0.0123",
        "wiki      word_perplexity  12.5000           12.5000",
    ]
