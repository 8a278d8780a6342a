"""`python -m runtime` is `int4-eval`."""

from formats.entry import evaluate

evaluate()
