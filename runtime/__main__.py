"""`python -m runtime` is `int4-eval`."""

from runtime.cli import main

main()
