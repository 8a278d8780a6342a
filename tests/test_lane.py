from threading import Event

import pytest

from formats.lane import Lane


def test_calls_are_made_in_their_order() -> None:
    made: list[int] = []
    with Lane(depth=2) as lane:
        for i in range(50):
            lane.put(made.append, i)
        lane.drain()
        assert made == list(range(50))


def test_no_more_calls_wait_than_the_lane_is_deep() -> None:
    go, made = Event(), list[int]()
    with Lane(depth=2) as lane:
        lane.put(go.wait)
        lane.put(made.append, 1)
        assert not made
        go.set()
        lane.put(made.append, 2)  # waits for the first
    assert made == [1, 2]


def fail() -> None:
    raise OSError("disk gone")


def test_an_error_comes_out_at_the_latest_at_the_end() -> None:
    with pytest.raises(OSError, match="disk gone"), Lane() as lane:
        lane.put(fail)


def test_after_an_error_of_the_caller_nothing_new_begins() -> None:
    go, made = Event(), list[int]()
    with pytest.raises(KeyboardInterrupt), Lane() as lane:
        lane.put(go.wait, 0.2)
        lane.put(made.append, 1)
        raise KeyboardInterrupt
    assert not made
