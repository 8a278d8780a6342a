"""The model card of an int4 checkpoint: what it was made of, how, and how good it is, as the text of README.md."""

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from formats.command import printable
from formats.errors import CheckpointError
from formats.manifest import EVALUATION_NAME, Manifest

LIBRARY = "int4-convert"
TAGS = ("int4", LIBRARY)
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
CARRIED_PREFIX = "extra_gated_"
WORST = 10  # matrices in the table of errors

CAUSAL = ("ForCausalLM", "LMHeadModel")  # ends of the names of classes that AutoModelForCausalLM takes
LOAD = """\
    pip install "int4-convert[hf]"

```python
{by_runtime}
```

or by transformers:

```python
import runtime  # without it transformers fills the layers with random numbers
from transformers import {model_class}

model = {model_class}.from_pretrained("{repo_id}", variant="i4")
```"""
ALONE = """\
import runtime

model = runtime.load("{repo_id}")"""
GENERATING = """\
import runtime
from transformers import AutoTokenizer

model = runtime.load("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""


def make_card(
    repo_id: str,
    manifest: Manifest,
    source_card: str,
    figures: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> str:
    """The card of the checkpoint of `manifest` in the repository `repo_id`, the same for the same arguments.

    Licence, languages and the like are those of the YAML in `source_card`; `figures` are what int4-eval wrote;
    `architecture` is the class of transformers that config.json names. Raises `CheckpointError` where one of the first
    two cannot be understood.
    """
    name = _plain(manifest.source.id.rpartition("/")[2])
    sections = {
        f"# {name} in int4": _introduction(manifest),
        "## Load": _loading(repo_id, architecture),
        "## Size": _sizes(manifest),
        "## Recipe": _recipe(manifest),
        "## Kept as they were": _kept(manifest),
        "## Errors": _errors(manifest),
        "## Evaluation": None if figures is None else _evaluation(manifest, figures),
    }
    body = "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{_metadata(manifest, source_card)}\n---\n\n{body}\n"


def _metadata(manifest: Manifest, source_card: str) -> str:
    from huggingface_hub import ModelCardData  # here, because importing it takes a second that --help need not pay

    found = _read_metadata(source_card)
    carried = {key: found[key] for key in found if key.startswith(CARRIED_PREFIX)}
    carried |= {key: _as_written(found[key]) for key in found if key in CARRIED}
    if "language" in carried:
        carried["language"] = _listed(carried["language"]) or None
    if manifest.source.revision is not None:
        carried |= {"base_model": manifest.source.id, "base_model_relation": "quantized"}
    tags = [*_listed(_as_written(found.get("tags"))), *TAGS]
    return ModelCardData(**carried, library_name=LIBRARY, tags=tags).to_yaml()


def _read_metadata(card: str) -> dict[str, Any]:
    """The YAML at the beginning of a card, as huggingface_hub reads it; empty where there is none."""
    from huggingface_hub import RepoCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not REGEX_YAML_BLOCK.search(card):
        return {}
    try:
        return dict(vars(RepoCard(card).data))
    except Exception as error:  # of yaml, which is a library of huggingface_hub's and none of ours
        raise CheckpointError(
            f"README.md of the source: its YAML cannot be read ({type(error).__name__}), nor its licence carried over; "
            "repair it, or put a card of your own in its place"
        ) from None


def _as_written(value: Any) -> Any:
    """Texts again of what YAML 1.1 made of them: `no`, which is Norwegian, is a Boolean there, 4 a number."""
    if isinstance(value, list):
        return [_as_written(one) for one in value if one is not None]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if value is None else str(value)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _introduction(manifest: Manifest) -> str:
    source = manifest.source
    name = _code(source.id)
    if source.revision is not None:
        name = f"[{source.id}](https://huggingface.co/{source.id}) at commit {_code(source.revision)}"
    return (
        f"{name} with the weights of its linear layers in 4 bits, {manifest.sizes.bits_per_weight:.2f} with scales, "
        "made by int4-convert."
    )


def _loading(repo_id: str, architecture: str | None) -> str:
    """How to load the model by its class, and run it if it is a causal language model, as one without a class is."""
    named = architecture is not None and architecture.isascii() and architecture.isidentifier()
    if architecture is None or not named or architecture.endswith(CAUSAL):
        model_class, by_runtime = "AutoModelForCausalLM", GENERATING
    else:
        model_class, by_runtime = architecture, ALONE
    return LOAD.format(by_runtime=by_runtime.format(repo_id=repo_id), model_class=model_class, repo_id=repo_id)


def _sizes(manifest: Manifest) -> str:
    sizes = manifest.sizes
    quantized = [row.spec for row in manifest.tensors if row.quantized]
    before = 8 * sum(spec.nbytes for spec in quantized) / max(1, sum(spec.numel for spec in quantized))
    rows = [
        ("all tensors, MB", f"{sizes.source_bytes / 1e6:,.1f}", f"{sizes.stored_bytes / 1e6:,.1f}"),
        (f"bits a weight, of {sizes.quantized} matrices", f"{before:.2f}", f"{sizes.bits_per_weight:.2f}"),
    ]
    return _table(("", "unquantised", "int4"), rows)


def _recipe(manifest: Manifest) -> str:
    recipe = manifest.recipe
    lines = [f"{recipe.summary}, by {recipe.converter}"]
    if seen := recipe.calibration:
        lines.append(f"calibrated with {seen.windows} windows of {seen.seq_len} tokens, text {_code(seen.sha256)}")
    for title, patterns in (("included", recipe.include), ("excluded", recipe.exclude)):
        lines += [f"{title} {_code(pattern)}" for pattern in patterns]
    return "\n".join(f"- {line}" for line in lines)


def _kept(manifest: Manifest) -> str:
    rows = [(str(len(names)), _plain(reason), _code(names[0])) for reason, names in manifest.kept.items()]
    return _table(("tensors", "why", "the first"), rows)


def _errors(manifest: Manifest) -> str:
    """Those of the worst matrices, with what calibration measured if there was any."""
    worst = manifest.worst_first[:WORST]
    columns = {
        "tensor": [_code(name) for name, _ in worst],
        "relative MSE": [f"{error.relative_mse:.2e}" for _, error in worst],
        "cosine": [f"{error.cosine:.6f}" for _, error in worst],
        "clipped": [f"{error.clipped:.3%}" for _, error in worst],
    }
    if manifest.recipe.calibration is not None:
        columns["of the outputs"] = ["" if error.output is None else f"{error.output:.2e}" for _, error in worst]
    if not worst:
        return ""
    explained = (
        "Of the matrices that lost most: ‖W − Ŵ‖² / ‖W‖², the cosine of the angle between W and Ŵ, and the share of "
        "weights beyond the outermost codes."
    )
    return f"{explained}\n\n{_table(columns, zip(*columns.values(), strict=True))}"


def _evaluation(manifest: Manifest, figures: Mapping[str, Any]) -> str:
    if figures.get("checkpoint") != manifest.digest:
        raise CheckpointError(
            f"{EVALUATION_NAME}: is of another checkpoint, or of another version of int4-eval; run "
            f"`int4-eval --json DIR/{EVALUATION_NAME}` again, or remove the file"
        )
    shown = {"perplexity": _text_figures, "tasks": _task_figures}
    try:
        parts = [show(figures) for key, show in shown.items() if key in figures]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{EVALUATION_NAME}: is not what `int4-eval --json` writes ({type(error).__name__}: {error}); write it "
            "again, or remove it"
        ) from None
    return "\n\n".join(parts)


def _text_figures(figures: Mapping[str, Any]) -> str:
    text = PurePath(figures["text"]).name  # the rest of a path is nobody's business
    protocol = (
        f"{figures['windows']:d} windows of {figures['seq_len']:d} tokens of {_code(text)}, computed in "
        f"{_plain(figures['dtype'])} on {_plain(figures['device'])}{_options(figures)}."
    )
    reference = figures.get("reference")
    before = "" if reference is None else _with_error(reference["perplexity"], reference["perplexity_se"], ".3f")
    rows = [("perplexity", _with_error(figures["perplexity"], figures["perplexity_se"], ".3f"), before)]
    if reference is not None:
        divergence = figures["kld"]
        rows += [
            ("perplexity increase", _with_error(figures["increase"], figures.get("increase_se"), ".2%"), ""),
            ("mean KL divergence, nats", _with_error(divergence["mean"], divergence["mean_se"], ".4f"), ""),
            ("its median and 99.9 %", f"{divergence['median']:.4f}, {divergence['p999']:.4f}", ""),
            ("same first choice", f"{figures['same_top1']:.2%}", ""),
        ]
    return f"{protocol}\n\n{_table(('', 'int4', 'source'), rows)}"


def _task_figures(figures: Mapping[str, Any]) -> str:
    harness = figures["harness"]
    shots, limit = harness["num_fewshot"], harness["limit"]
    protocol = (
        f"By lm-evaluation-harness {_plain(harness['lm_eval'])}"
        + ("" if shots is None else f", {shots:d} examples before each question")
        + ("" if limit is None else f", the first {limit:d} questions of each task")
        + _options(figures)
    )
    models = [scores for scores in (figures["tasks"], figures.get("reference", {}).get("tasks")) if scores]
    rows = [
        [*(_plain(scores[0][key]) for key in ("task", "metric")),
         *(_with_error(score["value"], score["stderr"], ".4f") for score in scores)]
        for scores in zip(*models, strict=True)
    ]  # fmt: skip
    return f"{protocol}:\n\n{_table(('task', 'metric', 'int4', 'source')[: 2 + len(models)], rows)}"


def _options(figures: Mapping[str, Any]) -> str:
    """Those of the int4 model that change its numbers or speed, as the end of a sentence."""
    activations = figures.get("activations")
    rounded = "" if activations is None else f", with {_plain(activations)} activations"
    return rounded + (", layers not joined" if figures.get("join") is False else "")


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form}}"


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Rows of cells as Markdown; empty where there are none."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [list(titles), *cells]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if cells else ""


def _plain(text: str) -> str:
    """`text` from a file as one line without tags and code."""
    return printable(text).translate({ord(sign): " " for sign in "<>`"})


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', ' ')}`"
