"""A thread that works beside the caller, so that reading, hashing and writing overlap."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Lane:
    """One thread that makes calls in the order in which they are put, of which at most `depth` wait.

    Use as a context: leaving it waits for the last call, or after an error drops those that have not begun. The error
    of a call is raised by a later `put`, or at the end.
    """

    def __init__(self, depth: int = 4) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[object]] = deque()

    def __enter__(self) -> "Lane":
        return self

    def put(self, call: Callable[..., object], *args: object) -> None:
        """Have `call(*args)` made after all before it; waits while too many are to be made."""
        if len(self._waiting) >= self._depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *args))

    def drain(self) -> None:
        """Wait until all calls are made."""
        while self._waiting:
            self._waiting.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            self._pool.shutdown(cancel_futures=True)
