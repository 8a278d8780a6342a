"""Several processes at one conversion, as torchrun starts them on one machine or on many with a shared folder."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from formats.errors import Int4Error, TemporaryError

T = TypeVar("T")

# Shares may take hours more or less. A process that is gone is noticed at once: its connections are closed.
LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """Which of `size` processes this is; the first leads."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """What of `items` is for this process."""
        return list(items[self.rank :: self.size])

    def led(self, work: Callable[[], T]) -> T:
        """What `work` gave the leader, for all of them; raises in all what it raised there.

        Others wait; raises `TemporaryError` where one of them is gone.
        """
        found: list[T | Int4Error | None] = [None]
        if self.leads:
            try:
                found = [work()]
            except Int4Error as error:
                found = [error]
        if self.size > 1:
            try:
                torch.distributed.barrier()
                torch.distributed.broadcast_object_list(found)
            except RuntimeError:
                raise TemporaryError("another process of this conversion has stopped; see what it printed") from None
        if isinstance(found[0], Int4Error):
            raise found[0]
        return found[0]  # type: ignore[return-value]  # the leader's, for all


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes that torchrun started with this one, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


def local_device(ranks: Ranks) -> str | None:
    """The device of this process where the user names none: of several each has a GPU of its machine."""
    if ranks.size == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
