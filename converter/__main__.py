"""`python -m converter` is `int4-convert`."""

from converter.cli import main

main()
