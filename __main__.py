"""`python -m mambabench`."""

from .harness.cli import main

main()
