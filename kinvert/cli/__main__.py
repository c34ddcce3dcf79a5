"""`python -m kinvert.cli`: the command line, for programs that start modules, such as torchrun."""

from kinvert.cli import main

if __name__ == "__main__":
    main()
