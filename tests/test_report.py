import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import EXAMPLE
from torch import nn

from converter.convert import convert, make_recipe
from converter.plan import make_plan
from converter.source import open_source
from formats.layout import Scheme
from formats.manifest import Manifest
from runtime.evaluate import BIN_EDGES, Divergence, Evaluation, Measurement
from runtime.report import Timing, draw, timings, write_report

pytest.importorskip("matplotlib")

MODEL = Measurement(40.0, 0.5, 1000, 2000.0, 1_000_000, None)
HISTOGRAM = tuple(range(len(BIN_EDGES) - 1))
RESULT = Evaluation(MODEL, MODEL, 0.02, 0.001, Divergence(0.05, 0.001, 0.03, 0.9, HISTOGRAM), 0.9)
TIMES = [Timing(32, 1.0, 2.0), Timing(64, 2.0, 3.0)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    source = open_source(str(EXAMPLE))
    plan = make_plan(source, make_recipe(Scheme(64), "absmax", (), ()))
    return convert(source, plan, tmp_path_factory.mktemp("report") / "out", [torch.device("cpu")])


def test_the_page_holds_its_pictures_and_nothing_from_elsewhere(tmp_path: Path, manifest: Manifest) -> None:
    write_report(tmp_path / "page", "my <model>", "perplexity 40", RESULT, manifest, TIMES)
    page = (tmp_path / "page" / "report.html").read_text()
    assert "my &lt;model&gt;" in page
    assert "perplexity 40" in page
    embedded = {
        name: base64.b64decode(data) for name, data in re.findall(r'alt="(\w+)" src="data:[^,]+,([^"]+)"', page)
    }
    assert embedded == {path.stem: path.read_bytes() for path in (tmp_path / "page").glob("*.png")}
    assert embedded.keys() == {"model", "layers", "divergence", "times"}
    assert "http" not in page


def test_without_a_reference_there_is_no_divergence(manifest: Manifest) -> None:
    assert draw(Evaluation(MODEL), manifest, []).keys() == {"model", "layers"}


def test_without_errors_of_matrices_they_are_not_drawn(manifest: Manifest) -> None:
    imported = replace(manifest, tensors=tuple(replace(row, error=None) for row in manifest.tensors))
    assert draw(Evaluation(MODEL), imported, []).keys() == {"model"}


def test_every_layer_and_kind_is_drawn(manifest: Manifest) -> None:
    (axis,) = draw(RESULT, manifest, TIMES)["layers"].axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
    assert len(drawn) == 7
    assert all(layers == [0, 1, 2] for layers in drawn.values())


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 10)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> "Embedding":
        self.seen.append(tuple(input_ids.shape))
        self.logits = self.table(input_ids)
        return self


def test_batches_are_timed_as_far_as_the_text_reaches() -> None:
    model = Embedding()
    found = list(timings(model, None, torch.zeros(300, dtype=torch.long), batch_size=2))
    assert [one.seq_len for one in found] == [32, 64, 128]
    assert set(model.seen) == {(2, 32), (2, 64), (2, 128)}
    assert all(one.model_ms > 0 and one.reference_ms is None for one in found)
