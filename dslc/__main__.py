"""`python -m dslc`."""

from dslc.cli import main

# The process of a served engine imports this file, and must not run it.
if __name__ == "__main__":
    main()
