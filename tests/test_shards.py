"""Fetching ahead: how many files there may be at once, and what an error leaves."""

import threading
from types import SimpleNamespace

import pytest

from converter.shards import FetchAhead


def test_the_thread_that_fetches_ends_with_an_error_though_it_waits_for_room() -> None:
    fetched: list[str] = []
    weights = SimpleNamespace(most=1, fetch=fetched.append, discard=lambda name: None)
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), FetchAhead(weights, ["a", "b"]) as ahead:  # type: ignore[arg-type]
        ahead.wait_for("a")
        (thread,) = set(threading.enumerate()) - before
        raise ZeroDivisionError
    thread.join(timeout=10)
    assert (thread.is_alive(), fetched) == (False, ["a"])
