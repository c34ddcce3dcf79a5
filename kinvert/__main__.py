"""`python -m kinvert`: the command line."""

from kinvert.cli import main

if __name__ == "__main__":
    main(prog_name="kinvert")
