import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from formats.errors import CheckpointError, UsageError
from formats.texts import windows_of
from runtime.evaluate import BIN_EDGES, evaluate, weight_bytes

VOCABULARY, WINDOWS, LENGTH = 11, 5, 8


class Bigram(nn.Module):
    """The next token depends on the last one only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(7))


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    assert windows_of(torch.arange(10), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows_of(torch.arange(10), 3, max_windows=2).shape == (2, 3)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="10 tokens, too few for a window of 11"):
        windows_of(torch.arange(10), 11)


@pytest.mark.parametrize("seq_len", [0, 1])
def test_a_window_needs_two_tokens(seq_len: int) -> None:
    with pytest.raises(UsageError, match="needs two tokens"):
        windows_of(torch.arange(10), seq_len)


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_a_model_without_sense_is_refused(windows: Tensor, bad: float) -> None:
    model = Bigram(1)
    model.table[:, 0] = bad
    with pytest.raises(CheckpointError, match="predicts nothing"):
        evaluate(model, windows)


class Headless(Bigram):
    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


class Classifier(Bigram):
    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids[:, -1]])


class Translator(Bigram):
    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        raise ValueError("You have to specify decoder_input_ids")


class Painter(Bigram):
    def forward(self, pixel_values: Tensor) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(logits=pixel_values)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Headless, "no attribute 'logits'"),
        (Classifier, r"its logits are \[1, 11\] for tokens \[1, 8\]"),
        (Translator, "specify decoder_input_ids"),
        (Painter, "unexpected keyword argument"),
    ],
)
def test_what_is_no_language_model_is_refused(windows: Tensor, kind: type[Bigram], found: str) -> None:
    with pytest.raises(UsageError, match=rf"{kind.__name__} cannot be evaluated .*{found}.*takes language models"):
        evaluate(kind(1), windows)


def test_what_both_exclude_adds_no_divergence(windows: Tensor) -> None:
    model, reference = Bigram(1), Bigram(1)
    for one in (model, reference):
        one.table[:, VOCABULARY - 1] = -float("inf")
    result = evaluate(model, windows % (VOCABULARY - 1), reference=reference)
    assert result.kld is not None
    assert result.kld.mean == pytest.approx(0, abs=1e-6)


def test_a_reference_with_another_vocabulary_is_refused(windows: Tensor) -> None:
    reference = Bigram(2)
    reference.table = nn.Parameter(reference.table[:, :-1].clone(), requires_grad=False)
    with pytest.raises(UsageError, match="vocabulary of 10, the model one of 11"):
        evaluate(Bigram(1), windows % 10, reference=reference)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_that_of_the_predicted_tokens(windows: Tensor, batch_size: int) -> None:
    model = Bigram(1)
    log_p = model.table.double().log_softmax(-1)
    nll = [-log_p[a, b].item() for row in windows.tolist() for a, b in pairwise(row)]
    found = evaluate(model, windows, batch_size=batch_size).model
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert found.tokens == WINDOWS * (LENGTH - 1)
    assert found.tokens_per_second > 0
    assert found.peak_memory_bytes is None


def test_divergence_is_that_of_the_reference_from_the_model(windows: Tensor) -> None:
    model, reference = Bigram(1), Bigram(2)
    result = evaluate(model, windows, reference=reference, batch_size=2)
    log_q, log_p = (m.table.double().log_softmax(-1) for m in (model, reference))
    tokens = windows[:, :-1].flatten()
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)[tokens].sort().values
    assert result.kld is not None
    assert result.kld.mean == pytest.approx(kld.mean().item(), rel=1e-5)
    assert result.kld.median == pytest.approx(kld[(len(kld) - 1) // 2].item(), rel=1e-5)
    assert result.kld.p999 == pytest.approx(kld[-1].item(), rel=1e-5)
    assert sum(result.kld.histogram) == len(kld)
    below = [low <= value < high for low, high in pairwise(BIN_EDGES) for value in kld[:1].tolist()]
    assert result.kld.histogram[below.index(True)] >= 1
    assert not any(result.kld.histogram[: below.index(True)])
    assert result.same_top1 == (log_p.argmax(-1) == log_q.argmax(-1))[tokens].double().mean().item()
    assert result.reference is not None
    assert result.reference.perplexity == pytest.approx(evaluate(reference, windows).model.perplexity)


def test_errors_are_those_of_the_means_of_windows(windows: Tensor) -> None:
    model, reference = Bigram(1), Bigram(2)
    result = evaluate(model, windows, reference=reference, batch_size=2)
    log_q, log_p = (m.table.double().log_softmax(-1) for m in (model, reference))
    pairs = windows[:, :-1], windows[:, 1:]
    q, p, kld = -log_q[pairs].mean(1), -log_p[pairs].mean(1), (log_p.exp() * (log_p - log_q)).sum(-1)[pairs[0]].mean(1)

    def error(values: Tensor) -> float:
        return float(values.std()) / math.sqrt(WINDOWS)

    assert result.kld is not None
    assert result.kld.mean_se == pytest.approx(error(kld), rel=1e-4)
    assert result.model.perplexity_se == pytest.approx(q.mean().exp().item() * error(q), rel=1e-4)
    ratio = (q - p).mean().exp().item()
    assert result.increase == pytest.approx(ratio - 1, rel=1e-4)
    assert result.increase_se == pytest.approx(ratio * error(q - p), rel=1e-4)


def test_a_single_window_has_no_standard_error(windows: Tensor) -> None:
    result = evaluate(Bigram(1), windows[:1], reference=Bigram(2))
    assert result.model.perplexity_se is result.increase_se is None
    assert result.kld is not None
    assert result.kld.mean_se is None


def test_a_model_does_not_diverge_from_itself(windows: Tensor) -> None:
    result = evaluate(Bigram(1), windows, reference=Bigram(1))
    assert result.kld is not None
    assert result.kld.p999 == pytest.approx(0, abs=1e-6)
    assert result.same_top1 == 1


def test_a_shared_weight_counts_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    assert weight_bytes(model) == 128
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 64


@pytest.mark.gpu
def test_peak_memory_is_the_weights_and_what_a_forward_pass_takes(windows: Tensor) -> None:
    result = evaluate(Bigram(1).cuda(), windows, reference=Bigram(2).cuda())
    for measured in (result.model, result.reference):
        assert measured is not None
        assert measured.peak_memory_bytes is not None
        logits = LENGTH * VOCABULARY * 4
        assert logits <= measured.peak_memory_bytes - measured.weight_bytes < 100 * logits
