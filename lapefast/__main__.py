"""`python -m lapefast` is the command line."""

from lapefast.cli import main

# Processes that are spawned import this file too.
if __name__ == "__main__":
    main()
