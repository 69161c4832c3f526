"""`python -m lapefast` is the command line."""

from lapefast.cli import main

main()
