"""Train a very small Llama on the documentation that ships with CPython and save it as a bf16 checkpoint."""

import ast
import json
import math
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

SEED = 0
VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
SEQ_LEN = 256
BATCH_SIZE = 8
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
EVAL_EVERY = 250
HELD_OUT_TOPICS = sorted(topics)[1::7]
SKIPPED_DIRS = {"test", "tests", "idlelib", "lib2to3", "site-packages"}
MIN_DOCSTRING_CHARS = 200
SHINGLE_WORDS = 8


def stdlib_docstrings() -> list[str]:
    """Return the distinct longer docstrings of the standard library, ordered by file path and position."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if SKIPPED_DIRS.intersection(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) >= MIN_DOCSTRING_CHARS:
                    found[docstring] = None
    return list(found)


def paragraphs(text: str) -> list[str]:
    """Split text at blank lines, keeping the indentation of each paragraph."""
    return re.split(r"\n(?:[ \t]*\n)+", text)


def shingles(paragraph: str) -> Iterator[tuple[str, ...]]:
    """Yield each run of SHINGLE_WORDS words of a paragraph, or all its words if it has fewer."""
    words = paragraph.split()
    for start in range(max(1, len(words) - SHINGLE_WORDS + 1)):
        yield tuple(words[start : start + SHINGLE_WORDS])


def split_corpus() -> tuple[list[str], str]:
    """Return the training documents and the held-out text."""
    held_out = "\n".join(topics[name] for name in HELD_OUT_TOPICS)
    # Topics quote one another and docstrings quote topics, so leaving out whole topics would not be enough.
    unseen = {shingle for paragraph in paragraphs(held_out) for shingle in shingles(paragraph)}
    train = []
    for document in [topics[name] for name in sorted(topics) if name not in HELD_OUT_TOPICS] + stdlib_docstrings():
        kept = [paragraph for paragraph in paragraphs(document) if unseen.isdisjoint(shingles(paragraph))]
        if kept:
            train.append("\n\n".join(kept))
    return train, held_out


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer that adds no special tokens when it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Return the perplexity over non-overlapping windows of SEQ_LEN tokens, dropping the tail."""
    windows = ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    # Every window predicts the same number of tokens, so the mean of the window losses is the mean over tokens.
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def train_model(train_ids: torch.Tensor, held_out_ids: torch.Tensor, steps: int, end_id: int) -> LlamaForCausalLM:
    """Train a Llama in float32 on random windows of the training tokens."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, num_hidden_layers=3, intermediate_size=384, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, tie_word_embeddings=True, max_position_embeddings=512,
        bos_token_id=end_id, eos_token_id=end_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    windows = train_ids.unfold(0, SEQ_LEN, 1)
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (BATCH_SIZE,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % EVAL_EVERY == 0 or step == steps:
            held_out = perplexity(model, held_out_ids)
            click.echo(f"step {step}: loss {loss.item():.3f}, held-out perplexity {held_out:.3f}")
    return model


@click.command(help=__doc__)
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), default=4500, show_default=True, help="Optimizer steps.")
def main(out_dir: Path, steps: int) -> None:
    """Run the whole example, from text to checkpoint."""
    torch.set_num_threads(2)
    out_dir.mkdir(parents=True, exist_ok=True)
    documents, held_out = split_corpus()
    (out_dir.parent / f"{out_dir.name}.heldout.txt").write_text(held_out, encoding="utf-8", newline="\n")

    tokenizer = train_tokenizer(documents)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": 512}
    (out_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")

    end_id = tokenizer.token_to_id(END_OF_TEXT)
    train_ids = torch.tensor([i for e in tokenizer.encode_batch(documents) for i in [*e.ids, end_id]])
    held_out_ids = torch.tensor(tokenizer.encode(held_out).ids)
    click.echo(f"{len(documents)} documents, {len(train_ids)} training tokens, {len(held_out_ids)} held-out tokens")

    model = train_model(train_ids, held_out_ids, steps, end_id)
    model.to(torch.bfloat16).save_pretrained(out_dir, max_shard_size="2MB")
    for shard in out_dir.glob("*.safetensors"):
        shard.chmod(0o644)  # They are written readable by their owner only.
    saved = AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32)
    click.echo(f"saved bf16 weights: held-out perplexity {perplexity(saved, held_out_ids):.3f}")


if __name__ == "__main__":
    main()
