"""`python -m converter` is `int4-convert`."""

from formats.entry import convert

convert()
