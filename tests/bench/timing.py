"""Microseconds a call, as a CUDA graph of many calls over so many copies of the weights that the L2 cache is cold."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

COLD_BYTES = 256 << 20
REPLAYS = 12


def copies_for(nbytes: int) -> int:
    """Copies of an operand of `nbytes` that together overflow the cache many times."""
    return max(2, -(-COLD_BYTES // nbytes))


def graph_time(calls: Sequence[Callable[[], torch.Tensor]]) -> float:
    """Median microseconds of one of `calls`, which all do the same on different copies."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times)
