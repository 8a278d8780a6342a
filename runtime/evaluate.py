"""How good, fast and large a language model is, alone and against the model that it was made from."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from formats.architecture import first_line
from formats.errors import CheckpointError, UsageError

BIN_EDGES = tuple(10 ** (exponent / 4) for exponent in range(-24, 9))  # 1e-6 to 100; what is beyond is at the ends
MAX_LOSS = 700.0  # exp of it is about the largest float
CHUNK_TOKENS = 1024  # log-probabilities in fp32 at a time: a vocabulary is large


@dataclass(frozen=True)
class Measurement:
    """One model over one text: `tokens` are those predicted; throughput counts every token of a forward pass.

    `perplexity_se` is its standard error, from how the windows differ; None for a single window. `peak_memory_bytes` is
    the model's own tensors and the most that a forward pass allocated above them on the GPU; None on a CPU, where it
    cannot be told apart from the rest of the process.
    """

    perplexity: float
    perplexity_se: float | None
    tokens: int
    tokens_per_second: float
    weight_bytes: int
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Divergence:
    """KL(reference ‖ model) of the next-token distributions over all predicted tokens, in nats."""

    mean: float
    mean_se: float | None  # its standard error, from how the windows differ
    median: float
    p999: float
    histogram: tuple[int, ...]  # tokens in each of the bins between `BIN_EDGES`


@dataclass(frozen=True)
class Evaluation:
    """A model's figures, and with a reference its figures and how far the two are apart.

    `increase` is the perplexity's, as a share of the reference's, with its standard error: that of the differences
    window by window, which is much smaller than either perplexity's.
    """

    model: Measurement
    reference: Measurement | None = None
    increase: float | None = None
    increase_se: float | None = None
    kld: Divergence | None = None
    same_top1: float | None = None


class _Runner:
    """Runs one model and keeps its account."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.weight_bytes = weight_bytes(model)
        self.nll: list[Tensor] = []  # of every predicted token
        self._seen = 0
        self._seconds = 0.0
        self._above: int | None = None

    def forward(self, batch: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T], timed."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        started = time.perf_counter()
        logits: Tensor = self.model(input_ids=batch, use_cache=False).logits
        if cuda:
            torch.cuda.synchronize(self.device)
            above = torch.cuda.max_memory_allocated(self.device) - before
            self._above = max(self._above or 0, above)
        self._seconds += time.perf_counter() - started
        self._seen += batch.numel()
        return logits

    def warm_up(self, batch: Tensor) -> None:
        """Run once without keeping the time, which includes compilation; raises `UsageError` for no language model."""
        try:
            logits = self.forward(batch)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:  # no logits, or other inputs
            raise no_language_model(self.model, first_line(error)) from error
        if logits.dim() != 3 or logits.shape[:2] != batch.shape:
            raise no_language_model(self.model, f"its logits are {list(logits.shape)} for tokens {list(batch.shape)}")
        self._seconds, self._seen = 0.0, 0

    def losses(self, windows: int) -> Tensor:
        """The mean loss of each window, fp64 [W]."""
        return torch.cat(self.nll).double().view(windows, -1).mean(1)

    def measurement(self, windows: int) -> Measurement:
        """The account so far; raises `CheckpointError` for a model whose predictions are no numbers."""
        losses = self.losses(windows)
        loss, error = losses.mean().item(), standard_error(losses)
        if not loss < MAX_LOSS:
            raise CheckpointError(f"the model predicts nothing: its mean loss is {loss}; are its weights damaged?")
        return Measurement(
            math.exp(loss),
            None if error is None else math.exp(loss) * error,
            sum(map(len, self.nll)),
            self._seen / self._seconds,
            self.weight_bytes,
            None if self._above is None else self.weight_bytes + self._above,
        )


def no_language_model(model: nn.Module, found: str) -> UsageError:
    """What to raise where `model` does not predict tokens, by what was `found` of it."""
    return UsageError(
        f"{type(model).__name__} cannot be evaluated on a text ({found}); this takes language models, which give "
        "logits [windows, tokens, vocabulary] for tokens alone"
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    *,
    reference: nn.Module | None = None,
    batch_size: int = 1,
    progress: Callable[[int], object] = lambda windows: None,
) -> Evaluation:
    """Perplexity of `model` over `windows` [W, T], each token predicted from those before it in its window.

    With `reference`, the same for it and the divergence between the two, batch by batch, so that no logits are kept.
    Raises `UsageError` for what is no language model, and for vocabularies that differ.
    """
    device = next(model.parameters()).device
    runner = _Runner(model, device)
    other = None if reference is None else _Runner(reference, device)
    divergences: list[Tensor] = []
    same = 0
    for run in (runner, other):
        if run is not None:
            run.warm_up(windows[:batch_size].to(device))
    for rows in torch.split(windows, batch_size):
        batch = rows.to(device)
        logits = runner.forward(batch)
        expected = None if other is None else other.forward(batch)
        if expected is not None and expected.shape[-1] != logits.shape[-1]:
            raise UsageError(
                f"the reference has a vocabulary of {expected.shape[-1]}, the model one of {logits.shape[-1]}; "
                "compare with the model that it was made from"
            )
        for q, p, target in _chunks(logits, expected, batch):
            _account(runner, q, target)
            if p is not None and other is not None:
                _account(other, p, target)
                divergences.append(_kl_divergence(p, q).cpu())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
        progress(len(rows))
    if other is None:
        return Evaluation(runner.measurement(len(windows)))
    found, original = (one.measurement(len(windows)) for one in (runner, other))
    differences = runner.losses(len(windows)) - other.losses(len(windows))
    ratio, error = math.exp(differences.mean()), standard_error(differences)
    kld = torch.cat(divergences).double().view(len(windows), -1)
    return Evaluation(
        found, original, ratio - 1, None if error is None else ratio * error, _summary(kld), same / kld.numel()
    )


def standard_error(values: Tensor) -> float | None:
    """Of the mean of values [W], one of each window; None for a single one."""
    return None if len(values) < 2 else (values.std() / math.sqrt(len(values))).item()


def _chunks(logits: Tensor, expected: Tensor | None, batch: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Log-probabilities fp32 [C, V] of model and reference, and the tokens [C] that came, a chunk at a time."""
    targets = batch[:, 1:].flatten()
    flat = [None if x is None else x[:, :-1].flatten(0, 1) for x in (logits, expected)]
    for start in range(0, targets.numel(), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        q, p = (None if x is None else x[part].float().log_softmax(-1) for x in flat)
        if q is not None:
            yield q, p, targets[part]


def _kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities [C, V] → [C]; what p excludes (−∞) counts nothing."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


def _account(runner: _Runner, log_probabilities: Tensor, targets: Tensor) -> None:
    runner.nll.append(-log_probabilities.gather(1, targets[:, None]).flatten().cpu())


def _summary(kld: Tensor) -> Divergence:
    """Of divergences [W, T − 1]."""
    ordered = kld.flatten().sort().values
    last = len(ordered) - 1
    median, p999 = ordered[last // 2].item(), ordered[round(0.999 * last)].item()
    bins = torch.bucketize(ordered, torch.tensor(BIN_EDGES[1:-1], dtype=torch.float64), right=True)
    histogram = tuple(torch.bincount(bins, minlength=len(BIN_EDGES) - 1).tolist())
    return Divergence(kld.mean().item(), standard_error(kld.mean(1)), median, p999, histogram)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; a tensor that is used twice counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
