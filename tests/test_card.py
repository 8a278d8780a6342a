"""The model card: YAML that huggingface_hub reads back, and tables of what the manifest says."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import EXAMPLE, convert_folder, write_checkpoint
from huggingface_hub import ModelCard, ModelCardData

from converter.card import make_card
from formats.errors import CheckpointError
from formats.layout import Scheme
from formats.manifest import CalibrationRecord, Manifest
from runtime import Int4Linear
from runtime.integrations.lm_eval import Score

REPO = "me/model-i4"
COMMIT = "0123456789" * 4
SOURCE_CARD = """\
---
license: other
license_name: llama3.1
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
library_name: transformers
tags:
- chat
base_model: owner/base
extra_gated_prompt: Say who you are
extra_gated_fields:
  Name: text
model-index: broken
---
# What the source says of itself
"""
FIGURES = {
    "text": "/home/somebody/novels.txt", "windows": 256, "seq_len": 512, "dtype": "float32", "device": "cpu",
    "perplexity": 38.83, "perplexity_se": 0.5, "increase": 0.048, "increase_se": 0.001, "same_top1": 0.87,
    "reference": {"perplexity": 37.06, "perplexity_se": None},
    "kld": {"mean": 0.076, "mean_se": 0.001, "median": 0.05, "p999": 0.9},
}  # fmt: skip


@pytest.fixture
def local(tmp_path: Path) -> Manifest:
    return convert_folder(write_checkpoint(tmp_path / "source"), tmp_path / "out")


@pytest.fixture
def manifest(local: Manifest) -> Manifest:
    """Of a source from the Hub."""
    return replace(local, source=replace(local.source, id="owner/name", revision=COMMIT)).sealed()


def metadata(manifest: Manifest, source_card: str = "") -> dict[str, Any]:
    data = ModelCard(make_card(REPO, manifest, source_card)).data
    assert isinstance(data, ModelCardData)
    fields: dict[str, Any] = data.to_dict()
    return fields


def rows(card: str, title: str) -> list[list[str]]:
    """The table below a heading, without its titles."""
    section = card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_metadata_name_the_source_and_carry_over_what_it_says_of_itself(manifest: Manifest) -> None:
    assert metadata(manifest, SOURCE_CARD) == {
        "base_model": "owner/name",
        "base_model_relation": "quantized",
        "language": ["en", "no"],
        "library_name": "int4-convert",
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["chat", "int4", "int4-convert"],
        "extra_gated_prompt": "Say who you are",
        "extra_gated_fields": {"Name": "text"},
    }


@pytest.mark.parametrize("source_card", ["", "# No YAML\n", "---\n---\n", "---\ntags: chat\n---\n"])
def test_a_licence_that_the_source_does_not_name_is_not_invented(manifest: Manifest, source_card: str) -> None:
    assert metadata(manifest, source_card).keys() == {"base_model", "base_model_relation", "library_name", "tags"}


def test_what_yaml_takes_for_something_else_stays_a_text(manifest: Manifest) -> None:
    card = "---\nlicense: no\nlanguage:\ntags:\n- 1\n- null\n- 2024-05-06\n- yes\n---\n"
    fields = metadata(manifest, card)
    assert "language" not in fields
    assert fields["license"] == "no"
    assert fields["tags"] == ["1", "2024-05-06", "yes", "int4", "int4-convert"]


def test_a_folder_is_no_base_model(local: Manifest) -> None:
    assert metadata(local, SOURCE_CARD).keys().isdisjoint({"base_model", "base_model_relation"})


@pytest.mark.parametrize("source_card", ["---\na: [\n---\n", "---\n- a list\n---\n", "---\n1: 2\n---\n"])
def test_yaml_that_cannot_be_read_is_an_error_because_a_licence_may_be_in_it(
    manifest: Manifest, source_card: str
) -> None:
    with pytest.raises(CheckpointError, match="YAML cannot be read"):
        make_card(REPO, manifest, source_card)


def test_the_same_gives_the_same_text(manifest: Manifest, tmp_path: Path) -> None:
    again = convert_folder(tmp_path / "source", tmp_path / "again")
    again = replace(again, source=manifest.source).sealed()
    assert make_card(REPO, manifest, SOURCE_CARD) == make_card(REPO, again, SOURCE_CARD)


def test_the_card_says_how_to_load_the_repository_that_it_is_in(manifest: Manifest) -> None:
    card = make_card(REPO, manifest, "")
    assert f'runtime.load("{REPO}")' in card
    assert f'from_pretrained("{REPO}", variant="i4")' in card


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("architecture", [None, "LlamaForCausalLM", "GPT2LMHeadModel", "no identifier"])
def test_each_way_to_load_a_language_model_is_whole(manifest: Manifest, architecture: str | None) -> None:
    first, second = snippets(make_card(REPO, manifest, "", None, architecture))
    assert "model.generate(" in first
    assert first.startswith("import runtime\n")
    assert second == (
        "import runtime  # without it transformers fills the layers with random numbers\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{REPO}", variant="i4")\n'
    )


def test_each_way_to_load_a_language_model_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    card = make_card(str(out), convert_folder(EXAMPLE, out, Scheme(256)), "")
    for snippet in snippets(card):
        exec(snippet.replace("max_new_tokens=50", "max_new_tokens=1"), names := {})
        assert any(isinstance(module, Int4Linear) for module in names["model"].modules())
    assert "Once upon a time" in capsys.readouterr().out


def test_a_model_of_another_kind_is_loaded_by_its_own_class(manifest: Manifest) -> None:
    first, second = snippets(make_card(REPO, manifest, "", None, "BertModel"))
    assert first == f'import runtime\n\nmodel = runtime.load("{REPO}")\n'
    assert "from transformers import BertModel\n\nmodel = BertModel.from_pretrained(" in second


def test_the_card_names_recipe_and_commit(manifest: Manifest) -> None:
    calibration = CalibrationRecord("a" * 64, 3, 512, 0)
    recipe = replace(manifest.recipe, include=("re:a|b",), calibration=calibration)
    card = make_card(REPO, replace(manifest, recipe=recipe), "")
    assert f"[owner/name](https://huggingface.co/owner/name) at commit `{COMMIT}`" in card
    assert "- absmax, symmetric, groups of 8, by int4-convert" in card
    assert f"- calibrated with 3 windows of 512 tokens, text `{'a' * 64}`" in card
    assert "- included `re:a|b`" in card


def test_sizes_and_counts_are_those_of_the_manifest(manifest: Manifest) -> None:
    card, sizes = make_card(REPO, manifest, ""), manifest.sizes
    assert rows(card, "Size")[1] == ["bits a weight, of 2 matrices", "16.00", f"{sizes.bits_per_weight:.2f}"]
    assert [cells[1] for cells in rows(card, "Kept as they were")] == list(manifest.kept)
    assert ["1", "output head", "`lm_head.weight`"] in rows(card, "Kept as they were")


def test_the_ten_matrices_that_lost_most_are_listed_with_the_worst_first(tmp_path: Path, manifest: Manifest) -> None:
    row = next(row for row in manifest.tensors if row.error)
    assert row.error is not None
    many = [replace(row, name=f"{i}.weight", error=replace(row.error, relative_mse=i / 100)) for i in range(12)]
    found = rows(make_card(REPO, replace(manifest, tensors=tuple(many)), ""), "Errors")
    assert [(cells[0], cells[1]) for cells in found[:2]] == [("`11.weight`", "1.10e-01"), ("`10.weight`", "1.00e-01")]
    assert len(found) == 10


def test_a_name_breaks_neither_table_nor_page(manifest: Manifest) -> None:
    tensors = tuple(replace(row, name=f"a|b`<script>\n{row.name}") for row in manifest.tensors)
    card = make_card(REPO, replace(manifest, tensors=tensors), "")
    assert "| `a\\|b <script>\\nlm_head.weight` |\n" in card


def test_without_figures_there_is_no_evaluation(manifest: Manifest) -> None:
    assert "## Evaluation" not in make_card(REPO, manifest, "")


def test_figures_of_the_checkpoint_are_shown_and_no_path_of_their_text(manifest: Manifest) -> None:
    card = make_card(REPO, manifest, "", {**FIGURES, "checkpoint": manifest.digest})
    assert "256 windows of 512 tokens of `novels.txt`, computed in float32 on cpu." in card
    assert "somebody" not in card
    assert rows(card, "Evaluation") == [
        ["perplexity", "38.830 ± 0.500", "37.060"],
        ["perplexity increase", "4.80% ± 0.10%", ""],
        ["mean KL divergence, nats", "0.0760 ± 0.0010", ""],
        ["its median and 99.9 %", "0.0500, 0.9000", ""],
        ["same first choice", "87.00%", ""],
    ]


OPTIONS = {"activations": "fp8", "join": False}


def test_options_that_change_the_figures_are_named(manifest: Manifest) -> None:
    card = make_card(REPO, manifest, "", {**FIGURES, **OPTIONS, "checkpoint": manifest.digest})
    assert "computed in float32 on cpu, with fp8 activations, layers not joined." in card


def test_figures_without_a_reference_are_a_perplexity(manifest: Manifest) -> None:
    alone = {key: FIGURES[key] for key in ("text", "windows", "seq_len", "dtype", "device", "perplexity")}
    card = make_card(REPO, manifest, "", {**alone, "perplexity_se": None, "checkpoint": manifest.digest})
    assert rows(card, "Evaluation") == [["perplexity", "38.830", ""]]


TASKS = [asdict(Score("arc_easy", "acc", 0.5, 0.0123))]  # as int4-eval writes them
HARNESS = {"lm_eval": "0.4.13", "num_fewshot": None, "limit": 100}


def test_tasks_are_shown_with_those_of_the_source(manifest: Manifest) -> None:
    before = [{**TASKS[0], "value": 0.75, "stderr": None}]
    figures = {"tasks": TASKS, "harness": HARNESS, "reference": {"tasks": before}, "checkpoint": manifest.digest}
    card = make_card(REPO, manifest, "", figures)
    assert "By lm-evaluation-harness 0.4.13, the first 100 questions of each task:" in card
    assert rows(card, "Evaluation") == [["arc_easy", "acc", "0.5000 ± 0.0123", "0.7500"]]


def test_options_that_change_the_tasks_are_named(manifest: Manifest) -> None:
    figures = {"tasks": TASKS, "harness": HARNESS, "checkpoint": manifest.digest, **OPTIONS}
    card = make_card(REPO, manifest, "", figures)
    assert "the first 100 questions of each task, with fp8 activations, layers not joined:" in card


def test_tasks_are_shown_behind_the_figures_of_a_text(manifest: Manifest) -> None:
    figures = {**FIGURES, "tasks": TASKS, "harness": {**HARNESS, "num_fewshot": 5}, "checkpoint": manifest.digest}
    card = make_card(REPO, manifest, "", figures)
    assert card.index("| same first choice | 87.00% |") < card.index("| arc_easy | acc | 0.5000 ± 0.0123 |")
    assert "0.4.13, 5 examples before each question, the first" in card


@pytest.mark.parametrize("checkpoint", ["0" * 64, None])
def test_figures_of_another_checkpoint_are_refused(manifest: Manifest, checkpoint: str | None) -> None:
    with pytest.raises(CheckpointError, match=r"evaluation\.json: is of another checkpoint"):
        make_card(REPO, manifest, "", {**FIGURES, "checkpoint": checkpoint})


@pytest.mark.parametrize(
    "wrong", [{"perplexity": "low"}, {"kld": None}, {"windows": 1.5}, {"text": 3}, {"tasks": 1}, {"activations": 8}]
)
def test_figures_of_another_kind_are_refused(manifest: Manifest, wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"evaluation\.json: is not what"):
        make_card(REPO, manifest, "", {**FIGURES, "checkpoint": manifest.digest, **wrong})
