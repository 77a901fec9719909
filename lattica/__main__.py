"""`python -m lattica` is the `lattica` command."""

from lattica.cli import main

if __name__ == "__main__":
    main()
