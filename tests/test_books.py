"""A real trained checkpoint, where it is at hand: the figures of the plain baseline."""

from pathlib import Path

import pytest
import torch
from checkpoints import SHARED, convert_folder

import runtime
from formats.layout import Scheme
from formats.texts import windows_of
from runtime.evaluate import evaluate

MODEL = SHARED / "models" / "books-llama-17m"
TEXT = SHARED / "data" / "books.test.txt"

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the checkpoint is not here")


@pytest.mark.parametrize(("size", "symmetric", "kld"), [(256, True, 0.1112), (256, False, 0.0820)])
def test_divergence_of_the_plain_baseline(tmp_path: Path, size: int, symmetric: bool, kld: float) -> None:
    transformers = pytest.importorskip("transformers")
    convert_folder(MODEL, tmp_path / "out", Scheme(size, symmetric))
    model = runtime.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = TEXT.read_text()[:40_000]
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    result = evaluate(model, windows_of(tokens, 512, max_windows=8), reference=reference, batch_size=4)
    assert result.kld is not None
    assert result.kld.mean == pytest.approx(kld, rel=0.02)
