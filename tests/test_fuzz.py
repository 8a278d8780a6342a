import random

import fuzz_parsers
import pytest
from fuzz_parsers import fuzz, mutated

from formats.errors import CheckpointError


def test_nothing_but_our_error_comes_out_of_the_parsers() -> None:
    fuzz(rounds=1500, seed=1)


def test_another_error_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rest: object) -> None:
        raise KeyError("data_offsets")

    monkeypatch.setattr(fuzz_parsers, "parse_header", broken)
    with pytest.raises(KeyError):
        fuzz(rounds=1, seed=1)


def test_mutations_reach_behind_the_first_check() -> None:
    """Some are still good JSON of another content, and some whole files: else nothing would be tested."""
    chances, verdicts = random.Random(2), set[str]()
    data = next((fuzz_parsers.DATA / "rows").glob("model-00001*")).read_bytes()
    for _ in range(400):
        changed = mutated(data, chances)
        try:
            fuzz_parsers.parse_header(lambda count, changed=changed: changed[:count], len(changed), "x")  # type: ignore[misc]
            verdicts.add("whole")
        except CheckpointError as error:
            verdicts.add(str(error).partition(";")[0].partition("'")[0][:24])
    assert "whole" in verdicts
    assert len(verdicts) > 6
