"""`python -m tokenprune`: the command line, for where no script is on the path."""

from tokenprune.cli import main

if __name__ == "__main__":
    main()
