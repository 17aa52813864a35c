"""`python -m flame`, the same as the `flame` command."""

from flame.cli import main

if __name__ == "__main__":
    main()
