"""Clocks: for kernels, as CUDA graphs over so many copies of the weights that the L2 cache is cold; and for models."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from formats.layout import ceil_div

COLD_BYTES = 256 << 20
REPLAYS = 12
ROUNDS = 7


def copies_for(nbytes: int) -> int:
    """Copies of an operand of `nbytes` that together overflow the cache many times."""
    return max(2, ceil_div(COLD_BYTES, nbytes))


class Captured:
    """A call as a CUDA graph: each call of it replays the graph and gives the result that the replay wrote anew."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call  # the graph uses the tensors of its call, and keeps none that was made before it
        synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            call()  # what compiles or loads cannot be captured
        synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def graph_time(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one of `calls`, which all do the same on different copies."""

    def one_after_another() -> None:
        for call in calls:
            call()

    replay = Captured(one_after_another)
    replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times)


def alternate(calls: Mapping[str, Callable[[], object]], *, until_done: bool = True) -> dict[str, float]:
    """Median seconds of each of `calls`, taken in turn so that a change of the GPU's clock meets all of them.

    The first round is not kept. Without `until_done` only the host's time counts, until the call returns.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            synchronize()
            started = perf_counter()
            call()
            if until_done:
                synchronize()
            times[name].append(perf_counter() - started)
    return {name: median(taken[1:]) for name, taken in times.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
