"""`python -m formats` is `int4-inspect`."""

from formats.cli import main

main()
