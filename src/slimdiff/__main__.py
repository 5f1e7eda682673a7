"""`python -m slimdiff` is the command line."""

from slimdiff.cli import main

main()
