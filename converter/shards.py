"""Several shards at once: on several devices, and while those behind them are fetched."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Lock, Semaphore, Thread
from types import TracebackType

import torch

from converter.output import OutputDir
from converter.pipeline import convert_shard
from converter.plan import ShardPlan
from converter.prepared import PreparedLayers
from converter.source import Source
from converter.weights import Weights
from formats.manifest import FileRecord

SHARDS_AT_ONCE = 4  # on a GPU, because one thread hashes more slowly than a disk reads; a CPU is busy with one


def convert_shards(
    source: Source,
    out: OutputDir,
    shards: Sequence[ShardPlan],
    devices: Sequence[torch.device],
    prepared: PreparedLayers,
    progress: Callable[[int], object],
    written: Callable[[FileRecord], object],
) -> None:
    """Convert `shards` into `out`, each on the next device that is idle; the first error ends them all.

    `progress` gets source bytes of chunks that are done, `written` each shard once it is whole.
    """
    idle: SimpleQueue[torch.device] = SimpleQueue()
    for device in [device for _ in range(SHARDS_AT_ONCE) for device in devices if device.type == "cuda"] or devices:
        idle.put(device)
    stopped, one_at_a_time = Event(), Lock()

    def note(nbytes: int) -> None:
        if stopped.is_set():
            raise CancelledError
        with one_at_a_time:
            progress(nbytes)

    def convert_next(shard: ShardPlan) -> None:
        ahead.wait_for(shard.source)
        device = idle.get()
        try:
            convert_shard(source, shard, out, device, prepared, note)
            written(out.kept[shard.output].file)
        finally:
            idle.put(device)
            ahead.done_with(shard.source)

    workers = idle.qsize()
    with ThreadPoolExecutor(workers) as pool, FetchAhead(source.weights, [s.source for s in shards]) as ahead:
        try:
            for future in as_completed([pool.submit(convert_next, shard) for shard in shards]):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class FetchAhead:
    """Fetches files of `weights` in their order, in a thread, while others are worked on; use as a context.

    No more are on this machine at once than `weights` allows.
    """

    def __init__(self, weights: Weights, names: Sequence[str]) -> None:
        self._weights = weights
        self._files: dict[str, Future[None]] = {name: Future() for name in names}
        self._room = None if weights.most is None else Semaphore(weights.most)

    def __enter__(self) -> "FetchAhead":
        Thread(target=self._run, daemon=True).start()  # a download cannot be stopped; nobody is to wait for its end
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.cancel()
        if self._room is not None:
            self._room.release()  # for the thread, if it waits, to see that it is over

    def wait_for(self, name: str) -> None:
        """Return when a file is here; raises what its fetching raised, or `CancelledError` after the context."""
        self._files[name].result()

    def done_with(self, name: str) -> None:
        """A file makes room for another."""
        self._weights.discard(name)
        if self._room is not None:
            self._room.release()

    def _run(self) -> None:
        for name, file in self._files.items():
            if self._room is not None:
                self._room.acquire()
            if file.cancelled():
                return
            with suppress(InvalidStateError):  # cancelled meanwhile
                try:
                    self._weights.fetch(name)
                    file.set_result(None)
                except BaseException as error:
                    file.set_exception(error)
