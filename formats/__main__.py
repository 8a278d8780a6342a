"""`python -m formats` is `int4-inspect`."""

from formats.entry import inspect

inspect()
